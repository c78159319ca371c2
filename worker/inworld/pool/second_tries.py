"""Second tries of creates whose first try is slow. Pure.

A create on a connection that a firewall has forgotten is never answered, and nothing tells so. A second try
on another connection costs little while most creates are answered, and makes things worse where the server is
slow for everybody. So second tries have an allowance of 5 % of all creates, and there is none while another
connection is slow as well.

How long a create may take follows from the answers, as TCP's retransmission timeout does (RFC 6298): the
smoothed mean and four times the smoothed deviation.
"""

from __future__ import annotations

# RFC 6298, section 2: the weights of a new sample, and the factor of the deviation.
MEAN_WEIGHT = 1 / 8
DEVIATION_WEIGHT = 1 / 4
DEVIATIONS = 4
# Second tries for each create, and the most that are saved up. Ours: far less than 5 % of the creates are
# slow where all is well, and a connection that has died takes at most five contexts with it.
SHARE = 0.05
MAX_ALLOWANCE = 5.0
# Another connection is slow if a create on it takes this part of the time that creates may take. Ours: two
# creates of one moment must see each other, though one of them was sent a little earlier.
SLOW_PART = 0.5


class SecondTries:
    """The allowance, and the time that a create may take: `after` seconds, between `least` and `most`."""

    def __init__(self, *, first: float, least: float, most: float) -> None:
        self._least = least
        self._most = most
        self.after = first
        self._mean: float | None = None
        self._deviation = 0.0
        # One at the start, because the second call of a pool may meet a connection that has died. The first
        # creates pay for it, so that all together keep the share.
        self._allowance = 1.0
        self._owed = 1.0

    def created(self, seconds: float) -> None:
        """Note how long the answer to a create took."""
        seconds = min(seconds, self._most)
        if self._mean is None:
            self._mean, self._deviation = seconds, seconds / 2
        else:
            self._deviation += DEVIATION_WEIGHT * (abs(seconds - self._mean) - self._deviation)
            self._mean += MEAN_WEIGHT * (seconds - self._mean)
        self.after = min(self._most, max(self._least, self._mean + DEVIATIONS * self._deviation))

    def sent(self) -> None:
        """Note a create."""
        if self._owed > 0:
            self._owed -= SHARE
        else:
            self._allowance = min(MAX_ALLOWANCE, self._allowance + SHARE)

    def is_slow(self, seconds: float) -> bool:
        """Whether a create that takes so long makes its connection slow."""
        return seconds >= SLOW_PART * self.after

    @property
    def is_left(self) -> bool:
        """Whether `take` would take one."""
        return self._allowance >= 1.0

    def take(self) -> bool:
        """Take one second try, if one is left."""
        if not self.is_left:
            return False
        self._allowance -= 1.0
        return True
