"""Devices of the cost model: dense peaks with their sources; one multiply-add is two operations."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Peaks of one device: memory bytes per second, int8 operations and bf16 operations per second.

    units: processors that share the peaks evenly (SMs, compute units, threads); what cannot be split runs on one.
    """

    name: str
    bytes_per_second: float
    int8_ops_per_second: float
    bf16_flops: float
    units: int
    source: str


DEVICES = {
    device.name: device
    for device in (
        Device("h100-sxm", 3.35e12, 1979e12, 989.5e12, 132, "NVIDIA H100 Tensor Core GPU datasheet, SXM5, dense"),
        Device("h200-sxm", 4.8e12, 1979e12, 989.5e12, 132, "NVIDIA H200 Tensor Core GPU datasheet, SXM, dense"),
        Device("b200-sxm", 8.0e12, 4500e12, 2250e12, 148, "NVIDIA HGX B200 datasheet, one GPU at 1000 W, dense"),
        Device("a100-sxm", 2.039e12, 624e12, 312e12, 108, "NVIDIA A100 datasheet, 80 GB SXM4, dense"),
        Device(
            "rtx-4090", 1.008e12, 660.6e12, 165.2e12, 128, "NVIDIA Ada GPU architecture whitepaper, appendix A, dense"
        ),
        Device("mi300x", 5.3e12, 2614.9e12, 1307.4e12, 304, "AMD Instinct MI300X datasheet, dense"),
        Device(
            "cpu-avx512",
            20e9,
            684e9,
            196e9,
            1,
            "measured: one thread of a 2-core Zen 4 with AVX-512 VNNI; cold pure read, lookup-table kernel at A8, "
            "torch bf16 matrix product at M = 128",
        ),
        Device(
            "cpu-avx2",
            10e9,
            171e9,
            67e9,
            1,
            "measured: one thread of an Intel Xeon at 2.5 GHz, best of many runs beside other work; cold read of 2 MB "
            "blocks, AVX2 lookup-table kernel at A8 and M = 64, float32 matrix product (MKL, AVX2) in bf16's place",
        ),
    )
}
"""By name. GPU figures are the vendors' own; seconds derived from them are modelled, not measured."""
