"""The command line: `tpx launch`, `tpx plan`. Needs no torch."""
