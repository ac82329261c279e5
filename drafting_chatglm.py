"""Drafts without a draft model: what followed the last time that the text went like this.

Owns where drafts come from (prompt lookup) and when they pay. Knows nothing of rows or layers, and
nothing here changes an answer: a draft is only a guess, and who decodes takes what it would have
drawn without it.
"""

# Tokens that must have stood together before: one alone says little of what follows.
LEAST_MATCH, LONGEST_MATCH = 2, 4
# Drafts of a first try; what comes of them decides on more.
FIRST_DRAFTS = 4
# The part of an answer's time that tries which do not pay may take.
STAKE = 0.02
# What a try that fails costs beyond a step of one token, in such steps, before one was measured.
FIRST_COST = 0.5
MEMORY = 0.8  # how much of what was measured before a new measurement leaves


class PromptLookup:
    """Guesses the next tokens from the text so far, as long as that pays.

    What a step of several tokens costs differs by machine, format and context, so that it is
    measured: tries which fail are given no more than `STAKE` of the time of all steps, and what
    others have gained. A match of full length may be tried without any savings.

    Args:
        most: drafts of a step.
        longest: tokens that are compared to find the place to go on from.
    """

    def __init__(self, most: int, longest: int | None = None) -> None:
        self.most = most
        self.longest = LONGEST_MATCH if longest is None else longest
        self.count = min(FIRST_DRAFTS, most)
        self.plain = 0.0  # seconds of a step of one token
        self.cost = 0.0  # seconds that drafts add to a step
        self.elapsed = self.balance = 0.0
        self.num_seen = 0
        # Behind which place the same tokens stood last.
        self.places: dict[tuple[int, ...], int] = {}

    def propose(self, input_ids: list[int], room: int) -> list[int]:
        """Return drafts of what follows the tokens, at most `room`; none if it does not pay."""
        place, size = self._find_place(input_ids)
        count = min(self.count, room)
        if size == 0 or count < 1 or not self._is_worth_it(size):
            return []
        # What begins to come around goes on doing so.
        period = len(input_ids) - place
        return [input_ids[place + i % period] for i in range(count)]

    def _find_place(self, input_ids: list[int]) -> tuple[int, int]:
        """Return behind which place the last tokens stood before, and how many of them."""
        place = size = 0
        least = min(LEAST_MATCH, self.longest)
        for end in range(self.num_seen + 1, len(input_ids) + 1):
            place = size = 0
            for length in range(min(self.longest, end), least - 1, -1):
                key = tuple(input_ids[end - length : end])
                if size == 0 and key in self.places:
                    place, size = self.places[key], length
                self.places[key] = end
        self.num_seen = len(input_ids)
        return place, size

    def _is_worth_it(self, size: int) -> bool:
        """Say whether a try may fail: there is what it would cost, or it is likely to succeed."""
        if self.plain == 0:
            return False  # nothing to compare with yet
        cost = self.cost or FIRST_COST * self.plain
        is_covered = self.balance - cost >= -STAKE * self.elapsed
        return is_covered or (size == self.longest and self.balance >= 0)

    def learn(self, num_drafts: int, num_taken: int, seconds: float) -> None:
        """Note what a step came to.

        Args:
            num_drafts: that it was given.
            num_taken: of them that were right.
            seconds: that it took, with the draws.
        """
        self.elapsed += seconds
        if num_drafts == 0:
            self.plain = _blend(self.plain, seconds)
            return
        self.cost = _blend(self.cost, max(seconds - self.plain, 0.0))
        self.balance += (num_taken + 1) * self.plain - seconds
        wanted = 2 * self.count if num_taken == num_drafts else num_taken + 1
        self.count = max(1, min(wanted, self.most))


def _blend(before: float, seconds: float) -> float:
    """Return a running mean, which begins with the first measurement."""
    return MEMORY * before + (1 - MEMORY) * seconds if before else seconds


__all__ = ["PromptLookup"]
