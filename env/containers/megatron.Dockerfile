# The stack megatron: Megatron-Core: tensor, pipeline, context and expert parallelism.
# Written by `make lock` from env/requirements/stacks.yaml and megatron.txt; edit those. Build it at the root:
#
#     docker build --file env/containers/megatron.Dockerfile --tag recipes-megatron .
#
# nvidia/cuda:13.0.2-devel-ubuntu24.04: the CUDA of the lock's torch 2.13.0. By tag, which may be built anew:
# tag@sha256:... holds one build. devel, because its data set helpers are compiled, and Transformer Engine would be.
# Python 3.12: Ubuntu 24.04's own; the lock was resolved for it.
# Every Python package: as locked in megatron.txt; its reasons are in megatron.in.
# libibverbs1: InfiniBand and RoCE: NCCL opens it at run time, and without it takes sockets.
# ibverbs-providers: the adapters' own parts of it.
# librdmacm1: connections over RDMA.
# g++: the data set helpers.
# make: the data set helpers.
# python3.12-dev: their headers.
# Ubuntu's own packages are not pinned: its archive drops old versions, and a pin would fail within weeks.
# Not inside, because it must fit the host: the GPU driver (nvidia-container-toolkit or --nv bring it), and the
# plug-ins of EFA and of TCPX, which are mounted: container.mounts of the cluster's profile.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

LABEL torch="2.13.0" \
      cuda-toolkit="13.0.3.0" \
      megatron-core="0.19.2" \
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
        g++ \
        make \
        python3.12-dev \
    && rm -rf /var/lib/apt/lists/*

COPY env/requirements/megatron.txt /tmp/megatron.txt
RUN python3.12 -m venv /usr/local/stack \
    && /usr/local/stack/bin/pip install --no-cache-dir --no-deps --requirement /tmp/megatron.txt

ENV PATH=/usr/local/stack/bin:$PATH
