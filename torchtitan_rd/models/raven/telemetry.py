"""What the recurrent state looks like in training, under the names of the Huginn runs."""

from collections.abc import Callable
from contextlib import ExitStack

import torch

from torchtitan_rd.models.raven.model import Raven


class StateTelemetry:
    """A context around forward passes; `read` describes the last one of this rank.
    Costs nothing outside of it.

    Letters: s_r the last state, e the embedded input, x the state as the coda sees it (ln_f(s_r), or s_r
    itself where the final norm is applied once), y what the head sees.
    Norms are L2 over the features of a token, means are over tokens.
    """

    def __init__(self, model: Raven):
        self.layers = model.transformer
        self.normed_twice = model.shape.final_norm == "twice"
        self.seen: dict[str, torch.Tensor] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> "StateTelemetry":
        recurrence = self.layers.recurrence
        for handle in (
            recurrence.register_forward_pre_hook(lambda module, inputs: self._keep(embedded=inputs[1])),
            recurrence.register_forward_hook(lambda module, inputs, states: self._left(states[-1])),
            # The input of the last iteration is the state before it.
            recurrence.iteration.register_forward_pre_hook(
                lambda module, inputs: self._keep(previous=inputs[0])
            ),
            self.layers.ln_f.register_forward_hook(lambda module, inputs, output: self._normed(output)),
        ):
            self._hooks.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def _keep(self, **tensors: torch.Tensor) -> None:
        self.seen.update({name: tensor.detach() for name, tensor in tensors.items()})
        if "embedded" in tensors:
            self.seen.pop("state", None)  # a new forward: ln_f will be called for the state first

    def _left(self, state: torch.Tensor) -> None:
        if not self.normed_twice:  # the coda sees the state as it left the recurrence
            self._keep(state=state)

    def _normed(self, output: torch.Tensor) -> None:
        # `Raven._predict` may call ln_f twice, for the state and, behind the coda, for what the head sees.
        # That order is all that tells the two apart; a forward with early read-outs calls it more
        # often, but is not watched.
        name = "hidden" if "state" in self.seen else "state"
        self.seen[name] = output.detach()

    @torch.no_grad()
    def read(self, summed: Callable[[torch.Tensor], torch.Tensor] = lambda own: own) -> dict[str, float]:
        """recurrent_residual: ||x - s_(r-1)||; rel_residual: the same over ||x||; recurrent_diff: ||x - e||.

        token_corr: mean cosine between the centred states of all pairs of tokens of a sequence,
        less 1/S for the pairs of a token with itself. Empty if no iteration was run.

        summed: see model_spec.Telemetry.
        """
        if not {"state", "hidden", "previous", "embedded"} <= self.seen.keys():
            return {}
        state, hidden, previous, embedded = (
            self.seen[k].float() for k in ("state", "hidden", "previous", "embedded")
        )
        residual, norm = (state - previous).norm(dim=-1), state.norm(dim=-1)
        of_tokens = {
            "recurrent_residual": residual,
            "rel_residual": residual / norm,
            "recurrent_diff": (state - embedded).norm(dim=-1),
            "recurrent_state_norm": norm,
            "last_hidden_norm": hidden.norm(dim=-1),
        }
        *sums, tokens = summed(torch.stack([*(x.sum() for x in of_tokens.values()), _count(norm)]))
        values = {
            **{name: total / tokens for name, total in zip(of_tokens, sums, strict=True)},
            "recurrent_state_token_corr": token_correlation(state, summed),
            "last_hidden_token_corr": token_correlation(hidden, summed),
        }
        return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))


def token_correlation(
    x_BSE: torch.Tensor, summed: Callable[[torch.Tensor], torch.Tensor] = lambda own: own
) -> torch.Tensor:
    """Mean over all pairs of tokens of the cosine of their centred vectors, less 1/S.
    summed: see model_spec.Telemetry.

    The sum over pairs is the squared norm of the sum: no S x S matrix,
    which at 131072 tokens nothing could hold.
    """
    centred = x_BSE - x_BSE.mean(dim=-1, keepdim=True)
    unit = centred / centred.norm(dim=-1, keepdim=True)
    length = summed(_count(x_BSE[0, :, 0]))
    return summed(unit.sum(dim=1)).square().sum(dim=-1).mean() / length**2 - 1 / length


def _count(x: torch.Tensor) -> torch.Tensor:
    """The number of elements, as a tensor to sum."""
    return x.new_tensor(x.numel())
