"Fails the run at the test after which a process has used more memory than tests may use."

import sys
import pytest

try:
    import resource
except ImportError:  # Windows
    resource = None


def peak_memory() -> int:
    "The largest amount of memory that this process has held so far, in bytes; 0 where that is unknown"
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else 1024 * peak


class MemoryLimit:
    "A plugin of pytest, one for each process. `most` is in bytes; only the first test beyond it fails."

    def __init__(self, most, peak=peak_memory):
        self.most, self.peak, self.exceeded = most, peak, False

    @pytest.hookimpl(trylast=True)  # after the fixtures' own teardown
    def pytest_runtest_teardown(self, item):
        if self.exceeded or (peak := self.peak()) <= self.most:
            return
        self.exceeded = True
        pytest.fail(
            f'After {item.nodeid}, the peak memory of this process is {peak / 1e9:.1f} GB, and tests may use '
            f'{self.most / 1e9:.1f} GB. Use smaller models or less data in this test, or in those that ran before it in '
            'the same process.',
            pytrace=False,
        )
