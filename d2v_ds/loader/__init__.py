"""The loader: shards -> plan -> samples -> decode -> collate -> StepBatch.

    find_set.py    what data.shards names -> a shard set
    plan.py        lengths -> BatchPlan.steps(cursor): which samples make which micro-batch
    reading.py     Reader.read -> modality.decode -> modality.collate -> Batch
    workers.py     the processes that do so ahead of time
    quarantine.py  samples that cannot be used
    loader.py      in the plan's order: this rank's part of a step, with the cursor after it
    stream.py      the same for tars without an index
    mixture.py     which source gives which step

Ranks take contiguous parts of each step's micro-batches and workers take whole micro-batches, so
neither changes the batches, and a run resumes from a cursor on any number of either. A cursor says
where a loader stands; it is what a checkpoint keeps of it.
"""
