"""What `tpx bench` runs in the ranks: links, latency, throughput and load.

asked.py alone needs no torch: the command line writes it, every rank reads it.
"""
