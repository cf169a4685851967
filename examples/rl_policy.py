"""A recurrent policy: python examples/rl_policy.py. An episode shows one of two signs, and steps
later a bell, at which the action must be the sign. Episodes end inside a rollout, and `resets` says
where the state starts from zero. torch.nn has no such thing, and loops over the steps."""

from timeit import repeat

import torch
from torch import nn

from charrnn_fast import GRU

B, T, H = 16, 64, 32  # environments, steps of a rollout, hidden units


class Recall:
    sign = left = torch.ones(B, dtype=torch.long)  # `left` counts the steps down to the bell, at 1

    def observe(self):  # (sign 0, sign 1, bell) of each environment, and whose episode begins
        new = self.left == 1
        self.sign = torch.where(new, torch.randint(2, (B,)), self.sign)
        self.left = torch.where(new, torch.randint(4, 10, (B,)), self.left - 1)
        signs = new & (self.sign == 0), new & (self.sign == 1)
        return torch.stack([*signs, self.left == 1], 1).float(), new

    def reward(self, action):
        return (2.0 * (action == self.sign) - 1.0) * (self.left == 1)


class Policy(nn.Module):
    def __init__(self, cls):
        super().__init__()
        self.rnn, self.head = cls(3, H), nn.Linear(H, 2)

    def forward(self, x, h, resets):
        if isinstance(self.rnn, GRU):
            y, h = self.rnn(x, h, resets=resets)
        else:
            y = torch.empty(*x.shape[:2], H)
            for t in range(len(x)):
                y[t], h = self.rnn(x[t : t + 1], h * ~resets[t, :, None])
        return torch.distributions.Categorical(logits=self.head(y)), h


@torch.no_grad()
def rollout(policy, tasks, h):
    steps = []
    for _ in range(T):
        x, new = tasks.observe()
        actions, h = policy(x[None], h, new[None])
        steps.append((x, new, action := actions.sample()[0], tasks.reward(action)))
    return *map(torch.stack, zip(*steps, strict=True)), h


def loss_of(policy, h, x, resets, actions, rewards):
    return -(policy(x, h, resets)[0].log_prob(actions) * rewards).sum() / rewards.abs().sum()


def main():
    torch.manual_seed(0), torch.set_num_threads(1)
    policy, stock, tasks, h = Policy(GRU), Policy(nn.GRU), Recall(), torch.zeros(1, B, H)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.01)
    for _ in range(30):
        before = h
        *batch, h = rollout(policy, tasks, h)
        policy.zero_grad()
        loss_of(policy, before, *batch).backward()
        optimizer.step()
    stock.load_state_dict(policy.state_dict())
    for name, each in (("charrnn_fast", policy), ("torch.nn", stock)):
        times = repeat(lambda each=each: loss_of(each, before, *batch).backward(), number=1)
        print(f"{name}: {1e3 * min(times):.2f} ms to learn from a rollout")
    logits = [each(batch[0], before, batch[1])[0].logits for each in (policy, stock)]
    difference = (logits[0] - logits[1]).abs().max().item()
    right = (batch[3] > 0).sum().item() / (batch[3] != 0).sum().item()
    print(f"{right:.0%} of the bells answered rightly; largest difference: {difference:.1e}")
    return right, difference


if __name__ == "__main__":
    main()
