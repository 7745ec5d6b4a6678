"""The configuration files of the test cluster, as templates.

What makes a cluster quick enough for tests: short intervals, nodes that share one machine (a port
and a loopback address each), fake sizes (`config_overrides`), no process or resource control; and
what makes it strict: accounts and limits enforced, whole requests refused that no partition can
serve.
"""

SLURM_CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
StateSaveLocation={root}/state
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdSpoolDir={root}/spool/%n
SlurmdPidFile={root}/run/slurmd-%n.pid
SlurmdLogFile={root}/log/slurmd-%n.log
SlurmdParameters=config_overrides
PlugStackConfig={root}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
PropagateResourceLimits=NONE
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,default_queue_depth=100
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmctldTimeout=30
MessageTimeout=5
SlurmdTimeout=10
KillWait=5
MinJobAge=3600
ReturnToService=2
EnforcePartLimits=ALL
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={ports[1]}
AccountingStoragePass={root}/munge/socket
AccountingStorageEnforce=associations,limits
AccountingStorageTRES=gres/gpu
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=600
{nodes}
PartitionName=batch Nodes=n[0-{last}] Default=YES MaxNodes=4 MaxTime=4:00:00 DefaultTime=10
PartitionName=short Nodes=n[0-{last}] MaxTime=1
{clouds}
"""

# Clusters of the sizes that NVIDIA publishes numbers for, to plan on: nodes that Slurm would start
# when a job needs them, and none does.
CLOUDS = {"h100": (128, 8), "b200": (16, 8), "gb200": (32, 4)}
CLOUD = """NodeName={name}-[1-{nodes}] CPUs=144 RealMemory=900000 Gres=gpu:{name}:{gpus} State=CLOUD
PartitionName={name} Nodes={name}-[1-{nodes}] MaxTime=4:00:00"""

NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr={address} Port={port} CPUs=64 RealMemory=512000"
    " Gres={gres}"
)

SLURMDBD_CONF = """
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket
PidFile={root}/run/slurmdbd.pid
LogFile={root}/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
"""

MARIADB = (
    "--no-defaults --user=root --datadir={root}/db --socket={root}/run/db.sock"
    " --pid-file={root}/run/db.pid --skip-networking --innodb-log-file-size=8M"
    " --innodb-buffer-pool-size=16M --sync-frm=0 --innodb-flush-log-at-trx-commit=0"
    " --innodb-flush-method=nosync"
)
