"""The loader: shards -> plan -> samples -> decode -> collate -> StepBatch.

    find_set.py    what data.shards names -> a shard set
    plan.py        lengths -> BatchPlan.steps(cursor): which samples are in which micro-batch
    reading.py     Reader.read -> modality.decode -> modality.collate -> Batch
    workers.py     processes that do this in advance
    quarantine.py  bad samples
    loader.py      this rank's part of each step, in the order of the plan, with the cursor after it
    stream.py      the same for tars without an index
    mixture.py     which source each step comes from
    webdataset.py  the samples of a set as a webdataset pipeline, outside of training

Ranks take contiguous parts of each step's micro-batches, and workers take whole micro-batches.
Neither changes the batches, so a run resumes from a cursor on any number of ranks and workers. A
cursor is the resume state of a loader, which a checkpoint stores.
"""
