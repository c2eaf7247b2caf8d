"""Solutions of notebook 2."""

import torch

from piflow_minimal import rollout


def pi_id(student, teacher, noise, uniforms, total_substeps=16):
    """Exercise 1: pi-ID with two queries. noise: (B, 2); uniforms: (B, 2) in [0, 1). -> scalar."""
    policy = student(noise, torch.ones(len(noise)))
    tau_a, tau_b = 1 - uniforms.sort(dim=1).values.T
    with torch.no_grad():
        x_a = rollout(policy.detach(), noise, 1.0, tau_a, total_substeps=total_substeps)
        x_b = rollout(policy.detach(), x_a, tau_a, tau_b, total_substeps=total_substeps)
        u_teacher = torch.cat([teacher(x_a, tau_a), teacher(x_b, tau_b)])
    u_policy = torch.cat([policy.velocity(x_a, tau_a), policy.velocity(x_b, tau_b)])
    return (u_policy - u_teacher).square().mean()


def attached(student, teacher, noise, uniforms, total_substeps=16):
    """Exercise 2: the same value, with a gradient through the rollout."""
    policy = student(noise, torch.ones(len(noise)))
    tau_a, tau_b = 1 - uniforms.sort(dim=1).values.T
    x_a = rollout(policy, noise, 1.0, tau_a, total_substeps=total_substeps)
    x_b = rollout(policy, x_a, tau_a, tau_b, total_substeps=total_substeps)
    u_teacher = torch.cat([teacher(x_a, tau_a), teacher(x_b, tau_b)])
    u_policy = torch.cat([policy.velocity(x_a, tau_a), policy.velocity(x_b, tau_b)])
    return (u_policy - u_teacher).square().mean()


def weighted(u_policy, u_teacher, t, power):
    """Exercise 3: squared errors of the velocity, each times t to this power."""
    square = (u_policy - u_teacher).square().mean(1)
    return (t**power * square).mean()
