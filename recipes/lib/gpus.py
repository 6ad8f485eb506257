"""The GPUs that the planner knows, from their data sheets. Pure; no torch.

What was measured on them is in `recipes.lib.calibration`.
"""

from __future__ import annotations

from dataclasses import dataclass

from recipes.lib.arguments import ArgumentError, nearest_name
from recipes.lib.flops import peak_flops


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    name: str
    """As CUDA reports it, or a part of that which tells it from all others here."""
    memory_gib: float
    """What CUDA reports as total: a little less than the data sheet's round number (driver, ECC)."""
    memory_tb_s: float
    """Bandwidth of its memory."""
    nvlink_gb_s: float
    """One direction, all links together; for a PCIe card without a bridge, its PCIe link."""
    source: str

    @property
    def peak(self) -> float:
        """FLOP/s in dense bfloat16."""
        found = peak_flops(self.name)
        assert found is not None, "every GPU of this table is in the one of flops.py"
        return found


GPUS: dict[str, Gpu] = {
    "a100_40": Gpu("A100-SXM4-40GB", 39.4, 1.555, 300, "NVIDIA A100 data sheet"),
    "a100": Gpu("A100-SXM4-80GB", 79.2, 2.039, 300, "NVIDIA A100 data sheet"),
    "h100": Gpu("H100 80GB HBM3", 79.1, 3.35, 450, "NVIDIA H100 data sheet, SXM"),
    "h100_pcie": Gpu("H100 PCIe", 79.1, 2.0, 64, "NVIDIA H100 PCIe product brief; PCIe 5 x16, no bridge"),
    "h100_nvl": Gpu("H100 NVL", 93.1, 3.9, 300, "NVIDIA H100 NVL product brief; pairs by bridge"),
    "h200": Gpu("H200", 139.8, 4.8, 450, "NVIDIA H200 data sheet, SXM"),
    "h200_nvl": Gpu("H200 NVL", 139.8, 4.8, 450, "NVIDIA H200 data sheet, NVL; up to four by bridge"),
    "b200": Gpu("B200", 178.3, 8.0, 900, "NVIDIA DGX B200 data sheet"),
}


def find_gpu(name: str) -> Gpu:
    """The GPU of that name in the table. Raises ArgumentError with the nearest."""
    key = name.strip().lower().replace("-", "_").replace(" ", "_")
    if key in GPUS:
        return GPUS[key]
    nearest = nearest_name(key, list(GPUS))
    raise ArgumentError(
        "gpu", name, f"wants one of {', '.join(GPUS)}" + (f"; nearest: {nearest}" if nearest else "")
    )


def gpu_of_sku(sku: str) -> Gpu | None:
    """The GPU that a part of a device's name means, as a cluster's profile gives it ("H100"); None: unknown.

    Where several are meant (A100 of 40 or of 80 GB) it is the one with the most memory: whoever refuses work because
    it cannot fit must be right.
    """
    words = {word for word in sku.lower().replace("-", " ").split() if word != "nvidia"}
    if not words:
        return None
    fitting = [gpu for gpu in GPUS.values() if words <= set(gpu.name.lower().replace("-", " ").split())]
    return max(fitting, key=lambda gpu: gpu.memory_gib, default=None)
