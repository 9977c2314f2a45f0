"""Damaged and hostile inputs for every parser that reads what others wrote.

    seeds of a target --mutations.py--> input --Target.parse--> outcome --harness.py--> a table

`python -m tests.fuzz [TARGET ...] --inputs N` runs it; tests/fuzz/test_fuzz.py runs a part.
"""
