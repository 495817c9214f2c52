"""The model on megatron-core: CPU with gloo, CUDA with NCCL."""

import warnings

# On import megatron-core says of each part of Transformer Engine and Apex that it is not there; `doctor` says it once.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import megatron.core.models.gpt.gpt_model
    import megatron.core.optimizer  # noqa: F401

# What it warns of at every run and cannot be changed here: collectives renamed in torch 2.13, and a CUDA setting.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
warnings.filterwarnings("ignore", message="When using async grad allreduce", category=UserWarning)
