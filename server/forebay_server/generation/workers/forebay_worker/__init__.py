"""What runs in the processes of generation engines, in environments that need not have Forebay.

The folder above is put on PYTHONPATH alone, so nothing here imports Forebay.
"""
