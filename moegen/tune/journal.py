"""What has been measured, kept for good in Optuna's storage: a journal file, or any of its databases.

    journal = Journal("~/.cache/moegen/tune/nvidia-h200.journal", scope="nvidia-h200/triton-3.6.0/<hash of kernels>")
    measurer = journal.measurer(layer.slug, measurer)   # answers from the journal, else measures and appends
    found = search(space, measurer, …)

    queue = journal.queue("standard-0")                 # several processes: who does which bucket
    queue.fill([(layer.slug, tokens), …])               # idempotent; takes up what dead workers left behind
    while claim := queue.claim():                       # None when nothing is waiting
        with claim:                                     # leaving without an exception marks it as done
            claim.layer, claim.tokens; claim.beat()     # beat now and then: it is alive (measurer(…, claim) does it)

`scope` names everything that a time depends on besides layer, tokens and tile configs: nothing measured under another
scope is ever read. A study `<scope>/<layer>/<tokens>` holds one finished trial a measurement, written in one piece, so
kill -9 loses at most the one in flight.
"""
