"""One node's facts, from any Source: collectors side by side, because each mostly waits. Asks a Source."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from checks.collect_gpu import collect_gpus
from checks.collect_host import (
    collect_environment,
    collect_file_systems,
    collect_host,
    collect_kernel_log,
    collect_named_files,
    collect_names,
    collect_versions,
)
from checks.collect_network import collect_interfaces, collect_rdma
from checks.collect_pci import collect_acs, collect_aer, collect_pci, count_corrected
from checks.evidence import Source
from checks.expectations import Expectations
from checks.facts import Node

T = TypeVar("T")


def collect_node(source: Source, name: str, expected: Expectations) -> Node:
    """Everything that the checks of tier `passive` judge. The expectations say which peers and folders to ask about."""
    seconds: dict[str, float] = {}

    def timed(subject: str, collect: Callable[[], T]) -> T:
        began = time.monotonic()
        try:
            return collect()
        finally:
            seconds[subject] = round(time.monotonic() - began, 3)

    # The workers answer each in a process of its own; a thread here waits for one of them, with a deadline.
    with ThreadPoolExecutor(max_workers=8, thread_name_prefix="collect") as pool:
        gpus = pool.submit(timed, "gpu", lambda: collect_gpus(source))
        log = pool.submit(timed, "kernel log", lambda: collect_kernel_log(source))
        acs = pool.submit(timed, "lspci", lambda: collect_acs(source))
        folders = pool.submit(timed, "folders", lambda: collect_file_systems(source, expected.folders))
        names = pool.submit(timed, "names", lambda: collect_names(source, expected))
        host = pool.submit(timed, "host", lambda: collect_host(source))
        versions = pool.submit(timed, "versions", lambda: collect_versions(source))
        environment = timed("environment", lambda: collect_environment(source))
        pci = timed("pci", lambda: collect_pci(source))
        corrected = count_corrected(source, pci, 0)
        rdma = timed("rdma", lambda: collect_rdma(source))
        interfaces = timed("interfaces", lambda: collect_interfaces(source, rdma))
        aer = timed("aer", lambda: collect_aer(source, pci, corrected))
        driver = gpus.result()
        return Node(
            name=name,
            gpus=driver,
            pci=pci,
            acs=acs.result(),
            aer=aer,
            rdma=rdma,
            interfaces=interfaces,
            file_systems=folders.result(),
            host=replace(host.result(), kernel_log=log.result()),
            names=names.result(),
            environment=environment,
            named_files=collect_named_files(source, environment),
            versions={"driver": driver.driver, "cuda": driver.cuda, **versions.result()},
            seconds=seconds,
        )
