"""`fibril connectivity test`: whether everything that shall reach each other does, from pods and nodes that are.

    collect.py    asks the services which pods and nodes there are
    plan.py       who asks whom what; pure
    runner.py     a child process for each namespace that something is asked from
    engine.py     that process: many probes at once; stands alone
    responder.py  answers in the pods of the nodes the test runs on
    report.py     the matrix and the failures; pure

Nothing needs to run at a target: a refused connection and an ICMP "port unreachable" came from there as well.
"""
