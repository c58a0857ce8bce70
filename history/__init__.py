"""Reading what was stored: SQL over every run, and the paper's pictures of one."""

from .session import History, open_history

__all__ = ["History", "open_history"]
