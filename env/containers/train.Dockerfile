# The stack train: the training recipes: torch with CUDA and what this project needs.
# Written by `make lock` from env/requirements/stacks.yaml and train.txt; edit those. Build it at the root:
#
#     docker build --file env/containers/train.Dockerfile --tag recipes-train .
#
# nvidia/cuda:13.0.2-base-ubuntu24.04: the CUDA of the lock's torch 2.13.0. By tag, which may be built anew:
# tag@sha256:... holds one build. base, because torch's wheels bring CUDA's libraries, and Triton its own assembler.
# Python 3.12: Ubuntu 24.04's own; the lock was resolved for it.
# Every Python package: as locked in train.txt; its reasons are in train.in.
# libibverbs1: InfiniBand and RoCE: NCCL opens it at run time, and without it takes sockets.
# ibverbs-providers: the adapters' own parts of it.
# librdmacm1: connections over RDMA.
# gcc: torch.compile and Triton build small C programs.
# python3.12-dev: the headers of these.
# Ubuntu's own packages are not pinned: its archive drops old versions, and a pin would fail within weeks.
# Not inside, because it must fit the host: the GPU driver (nvidia-container-toolkit or --nv bring it), and the
# plug-ins of EFA and of TCPX, which are mounted: container.mounts of the cluster's profile.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

LABEL torch="2.13.0" \
      cuda-toolkit="13.0.3.0" \
      nccl="2.29.7" \
      python="3.12"

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV DEBIAN_FRONTEND=noninteractive

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        python3.12 \
        python3.12-venv \
        libibverbs1 \
        ibverbs-providers \
        librdmacm1 \
        gcc \
        python3.12-dev \
    && rm -rf /var/lib/apt/lists/*

COPY env/requirements/train.txt /tmp/train.txt
RUN python3.12 -m venv /usr/local/stack \
    && /usr/local/stack/bin/pip install --no-cache-dir --no-deps --requirement /tmp/train.txt

ENV PATH=/usr/local/stack/bin:$PATH
