"""Tasks that several domains share; a domain's own are in its `tasks.py`. All need the extra `train`."""
