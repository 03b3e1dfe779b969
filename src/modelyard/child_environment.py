"""The environment of children: little of the server's, and none of its secrets."""

from __future__ import annotations

import os
from collections.abc import Mapping

#: What a child may know of the server's environment: where programs and certificates are, and which devices it has.
PASSED_ON = (
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "LD_LIBRARY_PATH",
    "LD_PRELOAD", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES",
    "CC", "CXX", "OMP_NUM_THREADS", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR",
)  # fmt: skip
PASSED_ON_TO_DOWNLOADS = (
    "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
)  # fmt: skip


def child_environment(extra: Mapping[str, str] | None = None, *, hub: bool = False) -> dict[str, str]:
    """Return a minimal environment for a child, without the server's secrets.

    Every child but a download (`hub=True`) runs with the hub offline and without the way to it.
    """
    names = PASSED_ON + PASSED_ON_TO_DOWNLOADS if hub else PASSED_ON
    environment = {name: os.environ[name] for name in names if name in os.environ}
    environment |= {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    if not hub:
        environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return environment | dict(extra or {})
