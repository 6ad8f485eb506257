# The stack sglang: SGLang: serving.
# Written by `make lock` from env/requirements/stacks.yaml and sglang.txt; edit those. Build it at the root:
#
#     docker build --file env/containers/sglang.Dockerfile --tag recipes-sglang .
#
# nvidia/cuda:13.0.2-devel-ubuntu24.04: the CUDA of the lock's torch 2.11.0. By tag, which may be built anew:
# tag@sha256:... holds one build. devel, because FlashInfer and DeepGEMM compile kernels at first use.
# Python 3.12: Ubuntu 24.04's own; the lock was resolved for it.
# Every Python package: as locked in sglang.txt; its reasons are in sglang.in.
# libibverbs1: InfiniBand and RoCE: NCCL opens it at run time, and without it takes sockets.
# ibverbs-providers: the adapters' own parts of it.
# librdmacm1: connections over RDMA.
# g++: the C++ part of these kernels.
# python3.12-dev: their headers.
# libnuma1: sgl-kernel links it.
# Ubuntu's own packages are not pinned: its archive drops old versions, and a pin would fail within weeks.
# Not inside, because it must fit the host: the GPU driver (nvidia-container-toolkit or --nv bring it), and the
# plug-ins of EFA and of TCPX, which are mounted: container.mounts of the cluster's profile.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

LABEL torch="2.11.0" \
      cuda-toolkit="13.0.2" \
      sglang="0.5.14" \
      nccl="2.28.9" \
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
        python3.12-dev \
        libnuma1 \
    && rm -rf /var/lib/apt/lists/*

COPY env/requirements/sglang.txt /tmp/sglang.txt
RUN python3.12 -m venv /usr/local/stack \
    && /usr/local/stack/bin/pip install --no-cache-dir --no-deps --requirement /tmp/sglang.txt

ENV PATH=/usr/local/stack/bin:$PATH
