"""s3:// -> a client of obstore, set up from the environment alone.

Keys: AWS_ACCESS_KEY_ID with AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN); else AWS_PROFILE, by boto3; else a web
identity (AWS_ROLE_ARN with AWS_WEB_IDENTITY_TOKEN_FILE), a container's role or the machine's. AWS_SKIP_SIGNATURE=true
asks without any.
Place: AWS_REGION or AWS_DEFAULT_REGION; AWS_ENDPOINT_URL or AWS_ENDPOINT_URL_S3 for a store that is not Amazon's.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from megatron_vlrl.data.objects.effort import Patience
from megatron_vlrl.data.objects.failures import KEYS
from megatron_vlrl.errors import DataError

INSTALL = "pip install 'megatron-vlrl[s3]'"
REQUEST_SECONDS = 30  # one attempt: an answer that still drips then is taken up again on a new connection


def connect(bucket: str, prefix: str, patience: Patience) -> Any:
    """A client for the objects under `prefix`. Raises DataError: no obstore, no such profile, no client."""
    try:
        from obstore.exceptions import BaseError
        from obstore.store import S3Store
    except ImportError as error:
        raise DataError(f"s3:// needs obstore, which is not installed ({error}); {INSTALL}") from error
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    options: dict[str, Any] = {
        "client_options": {
            "connect_timeout": timedelta(seconds=patience.connect),
            "read_timeout": timedelta(seconds=patience.silence),
            "timeout": timedelta(seconds=REQUEST_SECONDS),
            "allow_http": endpoint.startswith("http://"),
        },
        "retry_config": {"max_retries": 0, "retry_timeout": timedelta(seconds=0)},
    }
    profile = os.environ.get("AWS_PROFILE")
    if profile and "AWS_ACCESS_KEY_ID" not in os.environ:
        options["credential_provider"] = _profile(profile)
    try:
        return S3Store(bucket, prefix=prefix or None, **options)
    except (BaseError, ValueError) as error:
        kind = type(error).__name__
    raise DataError(f"s3://{bucket}/{prefix} cannot be opened ({kind}); {KEYS}; AWS_ENDPOINT_URL must be a URL")


def _profile(name: str) -> Any:
    try:
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        raise DataError(f"AWS_PROFILE={name} needs boto3, which is not installed ({error}); {INSTALL}") from error
    try:
        return Boto3CredentialProvider()
    except (BotoCoreError, ValueError) as error:
        kind = type(error).__name__
    raise DataError(f"AWS_PROFILE={name} gives no credentials ({kind}); check ~/.aws/config and ~/.aws/credentials")
