"""The AdamW kernel on the CPU: Triton's interpreter runs it as it is, and it gives the FP32
arithmetic that it stands for.

Triton decides when it is imported whether it interprets, so the kernel runs in a process of its
own.  The interpreter has no fused multiply-add: it rounds twice, as the reference does.
`tests/gpu/test_adamw.py` compares with Transformer Engine's FusedAdam.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

INTERPRETED = """
from types import SimpleNamespace
import torch
from recipes.training.adamw import scalars_of, step
from tests.recipes.adamw_reference import Reference, master_of, parameters, set_gradients

for wide in (False, True):
    ours, seed = parameters(), 0
    group = {"params": ours, "lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "bias_correction": True}
    reference, state = Reference(ours, group), {p: {} for p in ours}

    def initialize_state(p, remainders):
        zero = torch.zeros_like(p)
        state[p] = {"exp_avg": zero, "exp_avg_sq": zero.clone(), "master_param": torch.zeros_like(p, dtype=torch.int16)}

    flags = {"capturable": False, "adam_w_mode": 1, "use_decoupled_grad": True, "store_param_remainders": True}
    optimizer = SimpleNamespace(param_groups=[group], state=state, initialize_state=initialize_state, **flags)
    for seed in range(4):
        set_gradients(ours, seed, wide)
        ours[-1].decoupled_grad = None if seed == 2 else ours[-1].decoupled_grad
        step(optimizer)
        reference.step(scalars_of(group))
        for p, master, m, v in zip(ours, reference.masters, reference.m, reference.v, strict=True):
            same = [torch.equal(master_of(p, state[p]["master_param"]).view(torch.int32), master.view(torch.int32))]
            same += [torch.equal(state[p]["exp_avg"].view(torch.int16), m.view(torch.int16))]
            same += [torch.equal(state[p]["exp_avg_sq"].view(torch.int16), v.view(torch.int16))]
            if not all(same) or float((p.float() - master).abs().max()) > float(p.float().abs().max()) / 256:
                print("differs", wide, seed, tuple(p.shape), same)
    print("stepped", group["step"])
"""  # noqa: E501


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernel_is_fp32_adamw_with_rounded_moments_and_an_exact_master() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n") == ["stepped 4", "stepped 4", ""]
