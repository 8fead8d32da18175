"""The order of the stages, by name; a stage's code is imported only when the road is walked."""

from importlib import import_module

from sdconvert.stages import Stage

ROAD = {
    "10-checkpoint": "sdconvert.checkpoint.stage:CheckpointStage",
    "20-calibration": "sdconvert.calibration.stage:CalibrationStage",
    "30-quantize": "sdconvert.quantize.stage:QuantizeStage",
    "40-mha2sha": "sdconvert.mha2sha.stage:Mha2ShaStage",
    "50-export": "sdconvert.export.stage:ExportStage",
    "60-qnn": "sdconvert.qnn.stage:QnnStage",
    "70-android": "sdconvert.android.stage:AndroidStage",
    "80-report": "sdconvert.report.stage:ReportStage",
}


def load_road(length: int = len(ROAD)) -> list[Stage]:
    """Import and make the first `length` stages."""
    stages: list[Stage] = []
    for target in list(ROAD.values())[:length]:
        module, _, name = target.partition(":")
        stages.append(getattr(import_module(module), name)())
    return stages
