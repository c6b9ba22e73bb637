"""`llorch up`: the whole stack on one machine, in the foreground.

    command.py   flags, and what is wrong with them        stack.py    who starts, dies, restarts, stops, and when
    plan.py      pure: command lines, threads, restarts    part.py     one child process
    datadir.py   lock, keys, ports, what ran before        readiness.py  when does a part take work
    logs.py      children's output, bounded                report.py   what is said
    stop.py      signals, and the order of the end         ports.py, processes.py   which are free, which are whose
    model.py     which model folder is meant

Read `stack.Stack.run` first.
"""
