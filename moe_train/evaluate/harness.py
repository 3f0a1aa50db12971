"""Our models for lm-eval-harness (the package lm_eval, extra [eval]): its tasks on a native checkpoint, in this machine's layout.

What a request means is lm-eval's: `TemplateLM` splits texts into given and predicted tokens, and an empty context is the end of a
document, as for a Hugging Face model without a token for beginnings. So numbers are those of the exported model in its `HFLM`.
"""

from collections.abc import Sequence
from typing import Any

from moe_train.errors import UserError
from moe_train.evaluate.likelihood import Pair, check_likelihood, likelihoods
from moe_train.evaluate.opening import Restored
from moe_train.generate import Prompt, Sampling, cache_conflicts, generate, with_cache, without_cache

MAX_TOKENS = 256  # that a task may write which does not say how many: HFLM's number


def require_lm_eval() -> None:
    """Raise UserError where lm_eval is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError(f"lm_eval cannot be imported ({error}); pip install 'moe_train[eval]'") from None


def harness_model(restored: Restored, batch_size: int) -> Any:
    """A `lm_eval.api.model.LM`. All ranks make one and run the same tasks; requests are shared out inside of it.

    Raises UserError for a model whose tokens see later ones, and without lm_eval.
    """
    check_likelihood(restored.config)
    require_lm_eval()
    from lm_eval.api.model import TemplateLM

    return type("HarnessModel", (Requests, TemplateLM), {})(restored, batch_size)


class Requests:
    """Answers to the three kinds of requests, for `TemplateLM` to inherit beside its own methods."""

    def __init__(self, restored: Restored, batch_size: int) -> None:
        super().__init__()
        self.restored, self.batch_size = restored, batch_size
        self.window = restored.config.train.seq_len

    @property
    def eot_token_id(self) -> int:
        """The end of a document, which stands for an empty context, too."""
        return self.restored.tokenizer.eod

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; our tokenizers have no special tokens to add."""
        return [int(i) for i in self.restored.tokenizer.encode(string)]

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, Any, Any]], **_: Any) -> list[tuple[float, bool]]:
        return self._likelihoods([Pair(context, continuation) for _, context, continuation in requests])

    def _likelihoods(self, pairs: list[Pair]) -> list[tuple[float, bool]]:
        return [
            (one.log_probability, one.greedy) for one in likelihoods(self.restored.model, pairs, self.window, self.batch_size)
        ]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probabilities of whole texts, in windows that have one token of context at least."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows = [
            [Pair(*make_disjoint_window(w)) for w in get_rolling_token_windows(ids, self.eot_token_id, self.window, 1)]
            for ids in (self.tok_encode(*request.args) for request in requests)
        ]
        found = iter(self._likelihoods([pair for text in windows for pair in text]))
        return [sum(next(found)[0] for _ in text) for text in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts after contexts, of which the window's tokens count that are left beside those to write."""
        groups: dict[Sampling, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(self._sampling(request.args[1]), []).append(i)
        texts = [""] * len(requests)
        for sampling, members in groups.items():
            members.sort(key=lambda i: -len(requests[i].args[0]))
            for first in range(0, len(members), self.batch_size):
                some = members[first : first + self.batch_size]
                for i, text in zip(some, self._write([requests[i].args[0] for i in some], sampling), strict=True):
                    texts[i] = text
        return texts

    def _sampling(self, settings: dict[str, Any]) -> Sampling:
        """lm-eval's settings as ours. Raises UserError for those that we have not."""
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        known = normalize_gen_kwargs(settings, MAX_TOKENS)
        stop = tuple(text for text in handle_stop_sequences(known.pop("until", None), eos=None) if text)
        most, warm = known.pop("max_gen_toks"), known.pop("do_sample", False)
        temperature = known.pop("temperature", 0.0) if warm else 0.0
        top_k, top_p = known.pop("top_k", 0), known.pop("top_p", 1.0)
        known.pop("temperature", None)
        if known:
            name = min(known)
            raise UserError(f"generation_kwargs.{name}={known[name]}: is not known here; leave it out of the task")
        if not 0 < most < self.window:
            raise UserError(
                f"generation_kwargs.max_gen_toks={most}: must be from 1 to below train.seq_len={self.window}; lower it in the task"
            )
        return Sampling(most, temperature, top_k, top_p, stop)

    def _write(self, contexts: Sequence[str], sampling: Sampling) -> list[str]:
        model, device = self.restored.model, self.restored.world.device
        cached = not cache_conflicts(self.restored.config)
        predict = with_cache(model.decode, device) if cached else without_cache(model.logits, device)
        keep = self.window - sampling.max_tokens
        prompts = [Prompt(context, last=keep) for context in contexts]
        return [one.text for one in generate(predict, self.restored.tokenizer, prompts, sampling, self.window)]
