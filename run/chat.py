"""A conversation about a document, on one cache that grows.

Its tokens are those of one long prompt that transformers would make of the same
turns. The document and earlier turns are not read again. A turn's question and
answer are read once more, to enter the cache, and nothing that was said is
compressed.
"""
import sys
from dataclasses import dataclass

import torch

from model import Cache, Llama, answer_ids
from run.errors import BadInput
from run.html_report import answer_text, in_column


class NextTurn:
    """A tokenizer for `model.answer` whose question is not the first one."""

    def __init__(self, tokenizer):
        self.decode = tokenizer.decode
        self.stop_ids = tokenizer.stop_ids
        self.ask = tokenizer.next_turn


@dataclass
class Conversation:
    model: Llama
    tokenizer: object
    cache: Cache    # of one row: the document, and all that was said
    turns: int = 0  # questions that were answered

    def say(self, question: str, max_new_tokens=64, temperature=0.0, seed=0) -> str:
        """The answer to a question. Both become a part of the cache.

        An answer that was cut off ends with "…".
        Errors: BadInput if the model has no positions left for them.
        """
        asking = NextTurn(self.tokenizer) if self.turns > 0 else self.tokenizer
        prompt = asking.ask(question)
        largest = self.model.cfg.max_positions
        used = int(self.cache.next_position[0])
        left = largest - used - len(prompt)
        if left < 1:
            raise BadInput(
                f"{used} of the model's {largest} positions are used, and this turn needs "
                f"{len(prompt)} and room for an answer: the conversation is full")

        most = min(max_new_tokens, left)
        seed = seed + self.turns  # or every turn would draw the same numbers
        ids, = answer_ids(
            self.model, asking, self.cache, [question], most, temperature, seed)
        tokens = torch.tensor([prompt + ids], device=self.model.device)
        self.cache = self.model.extend(self.cache, tokens)
        self.turns += 1
        return answer_text(self.tokenizer, ids, most)


def chat(conversation: Conversation, *settings) -> None:
    """Answer lines of standard input until it ends, or the model is full.

    settings: of `Conversation.say`.
    """
    print("\nAsk, and end with Ctrl-D.")
    while True:
        try:
            line = input("\n> ").strip()
        except EOFError:
            print()
            return
        if not line:
            continue
        if not sys.stdin.isatty():
            print(line)  # a terminal has shown it already
        try:
            print(in_column(conversation.say(line, *settings), 0))
        except BadInput as error:
            print(error)
            return
