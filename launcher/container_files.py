"""A stack's image as a Dockerfile and as an Apptainer definition. Pure, but for reading the lock.

Both follow the lock: its file is what they install, and its cuda-toolkit decides the base image. `make lock` writes
them.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from launcher.spec import UserError
from launcher.stacks import FOLDER, Stack

CONTAINERS = Path("env/containers")
FABRIC = {
    "libibverbs1": "InfiniBand and RoCE: NCCL opens it at run time, and without it takes sockets",
    "ibverbs-providers": "the adapters' own parts of it",
    "librdmacm1": "connections over RDMA",
}
"""What NCCL needs of the network's user space; the kernel's part is the host's."""

NOT_INSIDE = (
    "Not inside, because it must fit the host: the GPU driver (nvidia-container-toolkit or --nv bring it), and the "
    "plug-ins of EFA and of TCPX, which are mounted: container.mounts of the cluster's profile."
)
CUDA_IMAGES = {"13.0": "13.0.2"}
"""The newest image of each CUDA: packages have patches of which there is no image, and within 13.0 either runs."""
UNPINNED = (
    "Ubuntu's own packages are not pinned: its archive drops old versions, and a pin would fail within weeks."
)
PLACE = "/usr/local/stack"


def container_files(stack: Stack) -> dict[Path, str]:
    """Both files of a stack: path to text."""
    folder = stack.repository / CONTAINERS
    return {
        folder / f"{stack.name}.Dockerfile": dockerfile(stack),
        folder / f"{stack.name}.def": apptainer(stack),
    }


def base_image(stack: Stack) -> str:
    """The image that the stack's is built on: the CUDA of its torch. Raises UserError for a CUDA without one."""
    cuda = ".".join(stack.pins()["cuda-toolkit"].split(".")[:2])
    if cuda not in CUDA_IMAGES:
        raise UserError(
            f"{stack.name}.txt locks CUDA {cuda}: add its image to CUDA_IMAGES ({', '.join(CUDA_IMAGES)})"
        )
    return f"nvidia/cuda:{CUDA_IMAGES[cuda]}-{stack.base[0]}-ubuntu24.04"


def dockerfile(stack: Stack) -> str:
    """The text of NAME.Dockerfile."""
    build = f"docker build --file {CONTAINERS}/{stack.name}.Dockerfile --tag recipes-{stack.name} ."
    labels = " \\\n      ".join(f'{name}="{version}"' for name, version in shown_pins(stack).items())
    packages = " \\\n        ".join(system_packages(stack))
    return f"""\
{_head(stack, build)}
FROM {base_image(stack)}

LABEL {labels}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV DEBIAN_FRONTEND=noninteractive

# hadolint ignore=DL3008
RUN apt-get update \\
    && apt-get install --yes --no-install-recommends \\
        {packages} \\
    && rm -rf /var/lib/apt/lists/*

COPY {FOLDER}/{stack.name}.txt /tmp/{stack.name}.txt
RUN python{stack.python} -m venv {PLACE} \\
    && {PLACE}/bin/pip install --no-cache-dir --no-deps --requirement /tmp/{stack.name}.txt

ENV PATH={PLACE}/bin:$PATH
"""


def apptainer(stack: Stack) -> str:
    """The text of NAME.def."""
    build = f"apptainer build recipes-{stack.name}.sif {CONTAINERS}/{stack.name}.def"
    labels = "\n".join(f"    {name} {version}" for name, version in shown_pins(stack).items())
    packages = " \\\n        ".join(system_packages(stack))
    return f"""\
{_head(stack, build)}
Bootstrap: docker
From: {base_image(stack)}

%labels
{labels}

%files
    {FOLDER}/{stack.name}.txt /tmp/{stack.name}.txt

%post
    set -eu
    export DEBIAN_FRONTEND=noninteractive
    apt-get update
    apt-get install --yes --no-install-recommends \\
        {packages}
    rm -rf /var/lib/apt/lists/*
    python{stack.python} -m venv {PLACE}
    {PLACE}/bin/pip install --no-cache-dir --no-deps --requirement /tmp/{stack.name}.txt

%environment
    export PATH={PLACE}/bin:$PATH
"""


def shown_pins(stack: Stack) -> dict[str, str]:
    """What people ask first of an image: `docker inspect` and `apptainer inspect` show it without starting it."""
    pins = stack.pins()
    names = {name: name for name in ("torch", "cuda-toolkit", "deepspeed", "megatron-core", "vllm", "sglang")}
    names["nccl"] = "nvidia-nccl-cu13"
    return {shown: pins[name] for shown, name in names.items() if name in pins} | {"python": stack.python}


def system_packages(stack: Stack) -> list[str]:
    """Ubuntu's packages of the image."""
    return [f"python{stack.python}", f"python{stack.python}-venv", *FABRIC, *stack.system]


def _head(stack: Stack, build: str) -> str:
    """The comment on top: what is pinned and why."""
    said = [
        f"The stack {stack.name}: {stack.summary}.",
        f"Written by `make lock` from {FOLDER}/stacks.yaml and {stack.name}.txt; edit those. Build it at the root:",
        "",
        f"    {build}",
        "",
        f"{base_image(stack)}: the CUDA of the lock's torch {stack.pins()['torch']}. By tag, which may be built anew: "
        f"tag@sha256:... holds one build. {stack.base[0]}, because {stack.base[1]}.",
        f"Python {stack.python}: Ubuntu 24.04's own; the lock was resolved for it.",
        f"Every Python package: as locked in {stack.name}.txt; its reasons are in {stack.name}.in.",
        *(f"{name}: {reason}." for name, reason in {**FABRIC, **stack.system}.items()),
        UNPINNED,
        NOT_INSIDE,
    ]
    lines = [
        line
        for one in said
        for line in (textwrap.wrap(one, 116, break_on_hyphens=False) if one[:1] != " " else [one]) or [""]
    ]
    return "\n".join(f"# {line}".rstrip() for line in lines)
