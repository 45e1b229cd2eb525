"""Cases as tensors. It stands apart from samples.py, which needs no torch."""
from dataclasses import dataclass

import torch

from data.samples import Case


@dataclass
class Batch:
    tokens: torch.Tensor        # (B, N) int64, contexts, padded on the right
    lengths: torch.Tensor       # (B,) int64
    protect: torch.Tensor       # (B, N) bool, tokens that are never dropped
    continuation: torch.Tensor  # (B, T) int64, a context's prompts and answers in a row
    segments: torch.Tensor      # (B, T) int64, the number of the query; -1 for padding
    supervised: torch.Tensor    # (B, T) bool, the prediction made at this token counts
    answers: torch.Tensor       # (B, T) bool, the next token belongs to an answer


def collate(cases: list[Case], prompts: bool = False) -> Batch:
    """Cases as tensors.

    prompts: supervise the tokens of the prompts as well, all but the first. The
    teacher has an opinion on them, too, and a cloze sentence is nearly all copied
    from the text.
    """
    tokens = []
    protect = []
    continuation = []
    segments = []
    supervised = []
    answers = []
    for case in cases:
        tokens.append(case.context)
        protect.append([i < case.n_protect for i in range(len(case.context))])
        for rows in (continuation, segments, supervised, answers):
            rows.append([])
        for j, query in enumerate(case.queries):
            # Token t predicts token t + 1, the last one of a query nothing. Marked
            # is the token that makes a prediction, not the one predicted.
            n_in_prompt = len(query.prompt) - 1  # predictions of tokens of the prompt
            n_answer = len(query.answer)
            continuation[-1] += query.prompt + query.answer
            segments[-1] += [j] * (n_in_prompt + n_answer + 1)
            supervised[-1] += [prompts] * n_in_prompt + [True] * n_answer + [False]
            answers[-1] += [False] * n_in_prompt + [True] * n_answer + [False]

    return Batch(
        tokens=pad(tokens, 0),
        lengths=torch.tensor([len(row) for row in tokens]),
        protect=pad(protect, False),
        continuation=pad(continuation, 0),
        segments=pad(segments, -1),
        supervised=pad(supervised, False),
        answers=pad(answers, False),
    )


def pad(rows: list[list], value) -> torch.Tensor:
    """Rows as a tensor, filled up on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])
