"""The loss over labelled positions."""

from torch import Tensor
from torch.nn import functional as F

from graftwerk.parallel.vocabulary import Vocabulary


def label_losses(
    logits: Tensor, labels: Tensor, weights: Tensor, vocabulary: Vocabulary | None = None
) -> Tensor:
    """The weighted cross-entropy (nats) of each label [N], float32.

    Their sum is a micro-batch's loss, not their mean: the divisor is the weight of the global
    batch, which no micro-batch knows.

    Args:
        logits: [N, V], any float type. A BERT that marks spans has a score for each of a row's
            tokens here, -inf at padding.
        labels: [N] int64.
        weights: [N] float32.
        vocabulary: how words are split over ranks, where `logits` are those of this rank's words
            alone, as under `parallel.vocabulary.split_logits`. The loss is the same on all ranks.
    """
    if vocabulary is not None:
        return vocabulary.losses(logits, labels) * weights
    return F.cross_entropy(logits.float(), labels, reduction="none") * weights
