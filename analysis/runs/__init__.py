"""What a run is, ours, imported or published: its files, numbers and times, and what two differ
in.
"""
