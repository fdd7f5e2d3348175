"""A training launcher for language models on several GPUs. Read the files in this order; each imports only from those above it.

    errors       every error a person can cause, and its exit code
    installed    versions of packages
    terminal     letters that a terminal cannot show
    rundir       the name of every file in a run directory
    manifest     the commit marker of a checkpoint; which one is valid
    recipe/      YAML -> checked, frozen Recipe
    cluster/     hardware -> nodes and devices                    (gpus.yaml)
    processes    what is started on a node, and ended for certain
    families     model families and prompt templates              (families.yaml)
    native       config of a model with its own code -> that of the transformers class that computes the same
    compat       what the code of old models needs to run on transformers 5
    modelshape/  config.json and tensor headers -> parameters     (catalogue.yaml)
    remotecode/  the .py files of a model -> found, looked at, pinned, staged
    memory/      bytes of a device, in parts
    steptime     seconds of a step, in parts
    shares       unlike cards -> the tokens of each
    pipeline     micro batches through stages -> seconds, waiting
    placement    layers -> unlike devices
    plan/        (Recipe, Cluster, ModelShape) -> Plan
    explain      where the value of a key comes from
    command      Plan -> what each node starts
    preflight/   Plan and this machine -> findings
    causes       what ended a rank -> words and what to type
    report       files of a run -> who failed first, and why
    story        files of a run -> its numbers, report.json
    mirror       a node without the run directory -> its copy, and what comes back
    agent        on every node of several: looks around, starts, ends
    connecting   a node -> what starts its agent, by ssh or srun
    sending      what a node without the run directory is sent
    nodes        the nodes of a run: started, followed, ended
    handshake    several nodes: each as this one? where do they meet?
    stacks       where the ranks of this machine are
    stalls       heartbeats -> a run that stands still, and who is waited for
    stopping     signals to a launcher, and `launch stop`
    watching     files of a run -> how it stands now
    supervise    start, follow, stop
    restarts     again, after a failure that need not come again
    foreground   chat and export, with this terminal
    show/        all of it -> what a person reads
    rehearsal    a plan -> the plan of its rehearsal, on this machine's CPU with a small model
    background   a launch that goes on without its terminal
    devices      recipe and flags -> the devices of a plan, or of a talk
    start        recipe and flags -> plan -> a run carried out
    slurm        a recipe -> a job in Slurm's queue
    runs         verbs about runs that are there
    cli          the other verbs
    worker/      torch side: executes a Plan (prepare, model, adapters, data/, training, checkpoint, metrics, chat, export)

Nothing above `worker/` imports torch or transformers, and nothing imports from `worker/`: it is started, not called.
"""

__version__ = "0.1.0"
