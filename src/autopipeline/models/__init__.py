"""Networks: plain modules whose parameter names are the checkpoint's keys."""
