"""scripts/bench/constants.py at toy size, and the sums of watch.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import warm

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "scripts" / "bench"


def test_every_figure_is_measured_at_toy_size(tmp_path: Path) -> None:
    out = tmp_path / "constants.json"
    command = [sys.executable, str(BENCH / "constants.py"), "--toy", "--models", "smollm/135M", "--out", str(out)]
    done = warm.run(command, ROOT)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads(out.read_text()) and result["toy"]
    figures = result["figures"]
    matrices = {name for name in figures if name.startswith("smollm/135M matmul")}
    # q and o, k and v, gate and up, down, head
    assert matrices == {f"smollm/135M matmul {m}" for m in (
        "576 x 576", "192 x 576", "1536 x 576", "576 x 1536", "49152 x 576"
    )}  # fmt: skip
    assert {*figures} - matrices == {"copy", "matmul 8192 x 8192", "smollm/135M attention default", "optimizer"}
    assert all(value > 0 for row in figures.values() for value in row.values())


def test_without_a_gpu_only_toy_sizes(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(BENCH / "constants.py")], capture_output=True, text=True)
    assert done.returncode == 2 and "--toy" in done.stderr and "Traceback" not in done.stderr


def test_busy_time_and_kinds_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import watch  # type: ignore[import-not-found]

    assert watch.busy([(5, 7), (0, 2), (1, 3), (1, 2)]) == 5
    assert watch.busy([]) == 0
    for name, kind in (
        ("nvjet_hsh_192x192_64x3_2x1_v_bz_coopB_TNN", "matmul"),
        ("void flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("triton_red_fused_rms_norm_3", "compiled"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4>", "other"),
    ):
        assert watch.kind_of_kernel(name) == kind, name
