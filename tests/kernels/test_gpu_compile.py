"""The Triton kernels compile for a real GPU, which the interpreter does not tell."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels.scripts import run

pytest.importorskip("triton")

# A process of its own: the pytest process may have Triton imported for the interpreter.
COMPILES = """
    import re
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from flipkd.kernels.encoder_ops import gpu as encoder_ops
    from flipkd.kernels.pair_score import gpu as pair_score
    from flipkd.kernels.pair_score import gpu_kernels
    from flipkd.kernels.pool_project import gpu as pool_project

    TORCH = {"*i8": torch.int8, "*bf16": torch.bfloat16, "*fp32": torch.float32}
    POINTERS = dict.fromkeys(("score", "probability", "kept_score", "kept_probability"), "*fp32")
    POINTERS |= dict.fromkeys(("counts", "bad_place", "ends", "kept_position"), "*i64")
    POINTERS |= {"weight": "*fp32", "starts": "*i32", "matrix": "*fp32", "pooled": "*fp32", "finite": "*u8"}
    POINTERS |= dict.fromkeys(("bias", "cosine", "sine"), "*fp32") | {"positions": "*i64"}
    POINTERS |= dict.fromkeys(("product", "state", "total", "normed", "made", "values"), "*bf16")
    SCALARS = dict.fromkeys(("left_rows", "right_rows", "pairs", "texts", "tokens", "rows", "width", "dim"), "i32")
    SCALARS |= dict.fromkeys(("slope", "offset", "min_score", "epsilon"), "fp32")

    def build(kernel, constants, warps=4, **pointers):
        names = kernel.arg_names
        pointers = {**POINTERS, **pointers}
        signature = {name: {**SCALARS, **pointers}.get(name, "constexpr") for name in names}
        values = {(names.index(name),): value for name, value in constants.items() if name in names}
        aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if name in pointers}
        source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
        options = {"num_warps": warps, "enable_fp_fusion": False}
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert ".visible .entry" in built.asm["ptx"]
        return built

    def build_score(kernel, rows, dim, config, index="*i32"):
        constants = pair_score.shape_constants(TORCH[rows], dim)
        side = "*i32" if constants["WORDS"] else rows
        values = {**constants, **config.kwargs, "DP4A": True, "CALIBRATE": True}
        pointers = {"left": side, "right": side, "left_index": index, "right_index": index}
        return build(kernel, values, config.num_warps, **pointers)

    def row_layout(built):
        # how the numbers of one row are spread over a thread, a warp and the warps where they are summed: the order
        # of the sum
        text = built.asm["ttgir"]
        (name,) = set(re.findall(r"}\\) : \\(tensor<\\d+x\\d+xf32, (#\\w+)>\\)", text))
        layout = re.search(
            name + r" = .*sizePerThread = \\[1, (\\d+)\\], threadsPerWarp = \\[\\d+, (\\d+)\\], "
            r"warpsPerCTA = \\[\\d+, (\\d+)\\]", text)
        return layout.groups()
"""

SCORE = """
    paths = (gpu_kernels.score_kernel, pair_score._CONFIGS), (gpu_kernels.runs_kernel, pair_score._RUN_CONFIGS)
    for kernel, configs in paths:
        built = build_score(kernel, "*i8", 128, configs[0])
        assert "dp4a.s32.s32" in built.asm["ptx"]
        assert "ld.global.v4.b32" in built.asm["ptx"]  # 16 bytes a thread
        build_score(kernel, "*i8", 127, configs[0], "*i64")
        build_score(kernel, "*fp32", 384, configs[0], "*i64")
    build(gpu_kernels.count_kernel, {"BLOCK": 1024})
    build(gpu_kernels.compact_kernel, {"BLOCK": 1024, "CALIBRATE": True})
    layouts = {row_layout(build_score(kernel, "*bf16", 128, config)) for kernel, all in paths for config in all}
    assert layouts == {("8", "16", "1")}, layouts
    print("right")
"""

POOL = """
    for states, out, kind, (width, dim) in (
        ("*bf16", "*i8", 2, (576, 128)), ("*fp16", "*u16", 1, (100, 33)), ("*fp32", "*fp32", 0, (2048, 1024)),
    ):
        constants = {**pool_project.constants(width, dim), "NORM": True, "LAST": kind == 1, "KIND": kind, "TEXTS": 8}
        warps = 16 if dim > 256 else 8
        built = build(pool_project._kernel, constants, warps, states=states, rows=out, matrix=states)
        assert built.metadata.shared <= 227 * 1024  # what a block of an H100 may have
    print("right")
"""

ENCODER_OPS = """
    for width in (384, 576, 8192):  # MiniLM, SmolLM2, a wide one
        for rms in (False, True):
            built = build(encoder_ops.add_norm_kernel, {
                **encoder_ops.norm_constants(width), "ADDS": True, "RMS": rms, "BIAS": not rms, "KEEPS": rms
            }, warps=4 if width <= 2048 else 16)
            assert "ld.global.v4.b32" in built.asm["ptx"]  # 16 bytes a thread
    for kind in range(4):
        built = build(encoder_ops.activate_kernel, {
            "KIND": kind, "GATED": kind == 3, "WIDTH": 1536, "ROWS": 4, "COLUMNS": 512
        })
        assert "ld.global.v4.b32" in built.asm["ptx"]
    build(encoder_ops.turn_kernel, {"HEADS": 12, "HALF": 32, "STRIDE": 960, "ROWS": 32, "COLUMNS": 32})
    print("right")
"""


LAUNCHES = """
    import torch
    from flipkd.kernels.pair_score import gpu as pair_score
    from flipkd.kernels.pair_score import gpu_kernels
    from flipkd.kernels.pool_project import gpu as pool_project

    launches = []

    def record(kernel):
        def run(*arguments, grid, warmup, **options):
            launches.append((kernel, dict(zip(kernel.arg_names, arguments)) | options))
        kernel.run = run

    tuned = pair_score._tuned_score_kernel, pair_score._tuned_runs_kernel
    for kernel in (*(each.fn for each in tuned), gpu_kernels.count_kernel, pool_project._kernel):
        record(kernel)
    tried = []
    for each in tuned:  # a stopwatch for a machine without a GPU: the second configuration is the fastest
        each.__dict__["do_bench"] = lambda call, quantiles: (call(), tried.append(call), [len(tried) % 5 != 2] * 3)[2]
    pair_score._TUNED_FROM = 1000
    rows = torch.ones(10, 128, dtype=torch.int8)
    runs, mixed = torch.arange(1000) // 100, torch.arange(1000) % 10
    for index, size, timed, pairs, warps in (
        (runs, 1000, 5, 16, 2), (runs, 1000, 0, 16, 2), (mixed, 1000, 5, 32, 4), (runs, 999, 0, 32, 4),
        (mixed, 999, 0, 64, 4),
    ):
        launches.clear()
        tried.clear()
        pair_score.pair_score_tensors(rows, rows, index[:size], index[:size], calibration=(1.0, 0.0))
        for kernel, arguments in launches:
            assert set(kernel.arg_names) <= set(arguments), set(kernel.arg_names) - set(arguments)
            beside = set(arguments) - set(kernel.arg_names)
            assert beside <= {"num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion"}, beside
            assert arguments["enable_fp_fusion"] is False
            assert arguments["DP4A"] is True
        assert len(tried) == timed
        assert (arguments["BLOCK_PAIRS"], arguments["num_warps"]) == (pairs, warps)
    states = torch.zeros(10, 24, dtype=torch.bfloat16)
    starts = torch.tensor([0, 10], dtype=torch.int32)
    pool_project.pool_project(states, starts, torch.zeros(5, 24), torch.ones(24), 1e-6, "mean", "int8")
    kernel, arguments = launches[-1]
    assert kernel is pool_project._kernel
    assert set(kernel.arg_names) == set(arguments) - {"num_warps", "enable_fp_fusion"}
    print("right")
"""


@pytest.mark.parametrize("script", [SCORE, POOL, ENCODER_OPS], ids=["pair_score", "pool_project", "encoder_ops"])
def test_compiles_for_a_gpu(script: str, tmp_path: Path) -> None:
    """The interpreter takes what the compiler refuses, so this is another test."""
    run(COMPILES + script, {"TRITON_CACHE_DIR": str(tmp_path)})


def test_launches_fit_the_kernels_and_tune_once() -> None:
    """Without a GPU no launch can run, but its arguments can be compared with the kernel's."""
    run(LAUNCHES, {})
