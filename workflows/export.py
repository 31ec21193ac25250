"""export: store -> files that other trainers read."""

from pipeline.errors import ConfigError, StaleOutputError
from pipeline.options import RunOptions, Summary
from pipeline.plan import Plan
from pipeline.resources import Resources
from pipeline.storage.run_folder import PLAN, RunFolder
from pipeline.workflow import ShardedWorkflow
from stages.exports.config import ExportConfig
from stages.exports.finish import DESCRIPTION, finish
from stages.exports.selection import Selection
from stages.exports.stage import DATA, GROUP, ExportStage, shards_of
from stages.stores import open_store, store_folder


class Export(ShardedWorkflow):
    """Writes the samples of a store as MDS, webdataset tars or parquet."""

    name = "export"
    summary = "write the samples of a store for other trainers: MDS, webdataset tars or parquet"
    config_class = ExportConfig
    config: ExportConfig
    default_executor = "local"

    def resources(self) -> Resources:
        return Resources(num_cpus=4.0)

    def plan(self, run: RunFolder) -> Plan:
        store = open_store(self.config.store)
        selection = Selection.of(self.config, store.manifest)
        if not len(store):
            raise ConfigError(f"store: {self.config.store} has no samples; nothing can be exported")
        return Plan(
            stages=(ExportStage(store_folder(self.config.store), selection),),
            shards=lambda: shards_of(store.manifest.shards(), selection),
            finalize=lambda run, rows, failed, show: finish(run, store, selection),
            final_file=DESCRIPTION,
            estimated_shards=store.manifest.num_shards,
            row_group=GROUP,
            folders={GROUP: DATA},
        )

    def run(self, out: str, options: RunOptions) -> Summary:
        """As of all workflows; in one line ConfigError for a folder that holds another export, or another run."""
        previous = RunFolder(out).storage.read_json_if_whole(PLAN)
        if isinstance(previous, dict) and previous.get("workflow") != self.name:
            raise ConfigError(f"--out {out}: is the folder of a run of {previous.get('workflow')}; give a new folder")
        try:
            return super().run(out, options)
        except StaleOutputError as error:
            changes = [line.strip() for line in str(error).splitlines()[1:-1]] or [
                "the store was changed since, or other parts of it are chosen"
            ]
            raise ConfigError(
                f"--out {out}: holds another export ({'; '.join(changes)}); give a new folder, or --restart to make "
                "again what differs"
            ) from error

    def next_steps(self, run: RunFolder) -> list[tuple[str, str]]:
        return [("data", f"{run.url}/{DATA}")]
