/* A stand-in for pyxis, NVIDIA's SPANK plugin that starts a job's tasks in a container.
 *
 * Debian has no pyxis and a test has no image to start, but the scripts under test carry pyxis flags, which a Slurm without the
 * plugin refuses.  This one accepts the same flags in the same places (srun, sbatch, salloc), starts no container, and writes what
 * reached each task to the file of its argument, a line a flag: "<jobid> <stepid> <taskid> flag=value" (a batch script is step
 * "batch", task 0; a flag without a value is followed by "=").  Flags given to sbatch reach the batch script and, as Slurm passes them
 * on in the job's environment, every step of the job too.
 *
 *     plugstack.conf:  required /path/fake_pyxis.so log=/path/pyxis.log
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <slurm/slurm.h>
#include <slurm/spank.h>

SPANK_PLUGIN(pyxis, 1)

static int keep(int which, const char *value, int remote);

#define FLAG(which, name, arginfo) {name, arginfo, "accepted and logged, starts no container", arginfo != NULL, which, keep}

static struct spank_option flags[] = {
    FLAG(0, "container-image", "IMAGE"),
    FLAG(1, "container-mounts", "MOUNTS"),
    FLAG(2, "container-workdir", "PATH"),
    FLAG(3, "container-name", "NAME"),
    FLAG(4, "container-env", "NAMES"),
    FLAG(5, "container-mount-home", NULL),
    FLAG(6, "no-container-mount-home", NULL),
    FLAG(7, "container-remap-root", NULL),
    FLAG(8, "no-container-remap-root", NULL),
    FLAG(9, "container-entrypoint", NULL),
    FLAG(10, "no-container-entrypoint", NULL),
    FLAG(11, "container-writable", NULL),
    FLAG(12, "container-readonly", NULL),
    FLAG(13, "container-save", "PATH"),
    FLAG(14, "container-entrypoint-log", NULL),
    FLAG(15, "segment", "NODES"), /* not of pyxis: sbatch's own from Slurm 24.05 on, which Debian 12 does not have */
};
enum { FLAGS = sizeof flags / sizeof *flags };

static char values[FLAGS][4096];
static int given[FLAGS];

static int keep(int which, const char *value, int remote) {
    (void)remote;
    if (flags[which].has_arg && !(value && *value)) return -1;
    given[which] = 1;
    snprintf(values[which], sizeof values[which], "%s", value ? value : "");
    return 0;
}

int slurm_spank_init(spank_t spank, int argc, char **argv) {
    (void)argc, (void)argv;
    for (int i = 0; spank_context() != S_CTX_SLURMD && i < FLAGS; i++)
        if (spank_option_register(spank, &flags[i]) != ESPANK_SUCCESS) return -1;
    return 0;
}

/* One write a line: tasks of one step append to the file at the same time. */
int slurm_spank_task_init(spank_t spank, int argc, char **argv) {
    uint32_t job, step, task;
    char line[5000], id[16];

    if (argc < 1 || strncmp(argv[0], "log=", 4)) return -1;
    int log = open(argv[0] + 4, O_WRONLY | O_APPEND | O_CREAT, 0666);
    if (log < 0) return -1;
    spank_get_item(spank, S_JOB_ID, &job);
    spank_get_item(spank, S_JOB_STEPID, &step);
    spank_get_item(spank, S_TASK_GLOBAL_ID, &task);
    snprintf(id, sizeof id, step == SLURM_BATCH_SCRIPT ? "batch" : "%u", step);
    for (int i = 0; i < FLAGS; i++) {
        if (!given[i]) continue;
        int length = snprintf(line, sizeof line, "%u %s %u %s=%s\n", job, id, task, flags[i].name, values[i]);
        if (write(log, line, length) != length) return -1;
    }
    return close(log);
}
