"""dit.py: the network, students and guidance, against closed forms and autograd."""

import dataclasses

import numpy as np
import pytest
import torch

from imagenet.checkpoints import init_student_from_teacher
from imagenet.dit import PRESETS, DiT, DiTConfig, dit_student, guided_teacher
from piflow_minimal import DXPolicy, GMFlowPolicy, pi_id_loss

SMALL = DiTConfig(hidden=24, depth=2, num_heads=2, num_classes=10, latent_size=8, logstd_hidden=16)


def close(value: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> bool:
    """Agreement relative to the largest entry."""
    assert value.shape == expected.shape
    return bool((value - expected).abs().max() <= tolerance * expected.abs().max())


def random_net(**changes) -> DiT:
    """A network whose every weight is random, so that nothing is hidden behind a zero."""
    torch.manual_seed(0)
    net = DiT(dataclasses.replace(SMALL, **changes)).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net


def inputs(batch: int = 3, size: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, size, size, generator=generator)
    return x, torch.linspace(1, 0.1, batch), torch.arange(batch) * 3 % 11


def test_xl2_has_the_published_size():
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        net = DiT(PRESETS["xl2"])
        x, t, labels = torch.empty(1, 4, 32, 32), torch.empty(1), torch.zeros(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            assert net(x, t, labels).shape == x.shape
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == 675
    assert counter.get_total_flops() / 2e9 == pytest.approx(118.6, abs=0.15)


# -- the network ---------------------------------------------------------------------------------


def test_a_new_network_predicts_zero_and_takes_any_square_size():
    for size in (2, 14, 32):
        x, t, labels = inputs(2, size)
        assert torch.equal(DiT(SMALL)(x, t, labels), torch.zeros_like(x))


def test_samples_of_a_batch_do_not_touch_each_other():
    net, (x, t, labels) = random_net(), inputs()
    whole = net(x, t, labels)
    for i in range(len(x)):
        alone = net(x[i : i + 1], t[i : i + 1], labels[i : i + 1])
        assert close(alone, whole[i : i + 1], 1e-5)


def test_checkpointing_changes_neither_output_nor_gradient():
    net, (x, t, labels) = random_net(head="gmflow", components=3), inputs()
    results = []
    for flag in (False, True):
        net.checkpointing = flag
        net.zero_grad()
        output = net(x, t, labels)
        (output.means.square().mean() + output.logweights.sum() * 1e-3).backward()
        results.append((output.means.detach(), net.blocks[0].mlp.fc1.weight.grad.clone()))
    for plain, recomputed in zip(*results, strict=True):
        assert close(recomputed, plain, 1e-6) and plain.abs().max() > 0


def test_logstd_does_not_reach_the_embedding():
    net, (x, t, labels) = random_net(head="gmflow", components=3), inputs()
    net(x, t, labels).logstds.sum().backward()
    assert net.final_layer.logstds[1].weight.grad.abs().max() > 0
    assert net.t_embedder.mlp[0].weight.grad is None
    assert net.y_embedder.embedding_table.weight.grad is None


# -- students ---------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [True, False])
def test_components_separate_only_because_of_the_noise(noise):
    """Equal components get equal gradients and stay equal for ever; the noise breaks the tie."""
    teacher, (x, _, labels) = random_net(), inputs()
    student = init_student_from_teacher(teacher, "gmflow", 4)
    bias = student.final_layer.means.bias
    if not noise:
        with torch.no_grad():
            bias.copy_(bias.unflatten(0, (-1, 4, 4))[:, :1].expand(-1, 4, -1).flatten())
    policy = dit_student(student, labels)(x, torch.ones(3))
    pi_id_loss(policy, guided_teacher(teacher, labels), 1.0, 1.0, total_substeps=16).loss.backward()
    gradient = bias.grad.unflatten(0, (-1, 4, 4))
    spread = (gradient - gradient.mean(1, keepdim=True)).abs().max() / gradient.abs().max()
    assert spread > 1e-2 if noise else spread < 1e-5


def test_students_give_policies():
    x, t, labels = inputs()
    gm = dit_student(random_net(head="gmflow", components=2), labels)(x, t)
    dx = dit_student(random_net(head="dx", components=2), labels, 0.5)(x, t)
    assert isinstance(gm, GMFlowPolicy) and isinstance(dx, DXPolicy)
    assert (dx.segment_size, dx.shift) == (0.5, 1.0)


# -- guidance ------------------------------------------------------------------------------------


def test_guided_teacher_is_one_batched_call_and_the_formula():
    """Rows outside the interval (here t = 1) are not computed a second time."""
    net, (x, t, labels) = random_net(), inputs()
    with torch.no_grad():
        cond, uncond = net(x, t, labels), net(x, t, torch.full_like(labels, 10))
    sizes = []
    net.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    u = guided_teacher(net, labels, 2.5, (0.0, 0.8))(x, t)
    assert sizes == [5]
    expected = torch.where((t <= 0.8).view(-1, 1, 1, 1), 2.5 * cond - 1.5 * uncond, cond)
    assert close(u, expected, 1e-5) and not close(u, cond)
    assert close(guided_teacher(net, labels)(x, t), cond, 1e-6) and sizes == [5, 3]
    assert close(guided_teacher(net, labels, 2.5, (0.0, 0.05))(x, t), cond, 1e-6) and sizes[2] == 3
    twice = guided_teacher(net, labels, 2.5, (0.0, 0.8))(x.repeat(2, 1, 1, 1), t.repeat(2))
    assert close(twice, expected.repeat(2, 1, 1, 1), 1e-5) and sizes[3] == 10


# -- kinds of arguments --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "t, labels",
    [
        (0.5, 3),
        (torch.tensor(0.5), torch.tensor(3)),
        (torch.full((3,), 0.5, dtype=torch.float64), torch.full((3,), 3, dtype=torch.int32)),
        (np.full(3, 0.5), np.full(3, 3)),
        (torch.full((3,), 0.5, dtype=torch.bfloat16), [3, 3, 3]),
    ],
)
def test_kinds_of_times_and_labels(t, labels):
    net, (x, _, _) = random_net(), inputs()
    expected = net(x, torch.full((3,), 0.5), torch.full((3,), 3))
    assert torch.equal(net(x, t, labels), expected)
    assert torch.equal(net(x.double(), t, labels), expected)


def test_an_integer_time():
    net, (x, _, labels) = random_net(), inputs()
    assert torch.equal(net(x, 1, labels), net(x, torch.ones(3), labels))


def test_positions_follow_the_weights_dtype_and_the_size():
    """In bfloat16 and under autocast the tokens stay bfloat16: nothing is promoted."""
    net, (x, t, labels) = random_net(), inputs()
    seen = []
    net.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        net(x, t, labels)
    assert close(net.bfloat16()(x, t, labels).float(), random_net()(x, t, labels), 0.05)
    assert seen == [torch.bfloat16] * 2
    assert "positions" not in net.state_dict()
    large = random_net(latent_size=12)
    assert torch.equal(large(*inputs(3, 8)), random_net()(*inputs(3, 8)))


def test_flipped_clock_and_second_layernorm():
    net, (x, t, labels) = random_net(), inputs()
    flipped = random_net(flip_time=True)
    assert torch.equal(flipped(x, 1 - t, labels), net(x, 1 - (1 - t), labels))
    assert not torch.equal(random_net(norm2_eps=1e-2)(x, t, labels), net(x, t, labels))
