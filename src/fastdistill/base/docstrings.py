"Read Google-style docstrings."

import inspect
import re
from collections.abc import Callable


def parameter_texts(o: Callable, section: str = 'Args') -> dict[str, str]:
    """Read a section of a Google-style docstring, as {parameter: text}.

    Args:
        o: A function or class.
        section: Heading of the section, such as 'Args' or 'Attributes'.
    """
    _, _, found = (inspect.getdoc(o) or '').partition(f'\n{section}:\n')
    entries = re.findall(r'^    (\S[^:\n]*): (.*(?:\n {5,}.*)*)', found.partition('\n\n')[0], re.M)
    return {
        n.lstrip('*'): ' '.join(text.split()) for names, text in entries for n in names.split(', ')
    }
