"""Types of modules that take seconds to load, for annotations of commands alone.

A command answers a wrong option before PyTorch is loaded, so its module imports nothing heavy, and names heavy types as
``lazy_types.Engine``. Nothing evaluates such an annotation: jsonargparse, which would import what is under
``TYPE_CHECKING`` in a command's own module, leaves out what it cannot resolve. Options themselves have light types.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from viasd_calib.calibration.artifacts import CalibrateArtifact as CalibrateArtifact
    from viasd_calib.calibration.artifacts import CalibratedCandidate as CalibratedCandidate
    from viasd_calib.calibration.artifacts import FitArtifact as FitArtifact
    from viasd_calib.calibration.certify import CertifiedResult as CertifiedResult
    from viasd_calib.calibration.certify import TestedCandidate as TestedCandidate
    from viasd_calib.calibration.monitor import Monitor as Monitor
    from viasd_calib.calibration.monitor import MonitorReport as MonitorReport
    from viasd_calib.calibration.paired import Interval as Interval
    from viasd_calib.calibration.policy_timing import Decision as Decision
    from viasd_calib.calibration.policy_timing import PolicyTiming as PolicyTiming
    from viasd_calib.calibration.reliability import Reliability as Reliability
    from viasd_calib.calibration.text_log import ReadLog as ReadLog
    from viasd_calib.decoding.acceptance import Tier as Tier
    from viasd_calib.decoding.conversation import Turn as Turn
    from viasd_calib.decoding.decoder import Decoder as Decoder
    from viasd_calib.decoding.decoder import Emitted as Emitted
    from viasd_calib.decoding.engine import Engine as Engine
    from viasd_calib.decoding.policies import Policy as Policy
    from viasd_calib.decoding.policies import PolicyKind as PolicyKind
    from viasd_calib.decoding.sampling import Sampling as Sampling
    from viasd_calib.decoding.session import Generation as Generation
    from viasd_calib.evaluation.bench import BenchResult as BenchResult
    from viasd_calib.evaluation.bench import BenchSettings as BenchSettings
    from viasd_calib.evaluation.frontier import Frontier as Frontier
    from viasd_calib.evaluation.offload_result import OffloadResult as OffloadResult
    from viasd_calib.evaluation.report import SampleText as SampleText
    from viasd_calib.evaluation.route_quality import RouteQuality as RouteQuality
    from viasd_calib.models import LoadVerifier as LoadVerifier
    from viasd_calib.models import Verifier as Verifier
    from viasd_calib.pipeline.plan_decoded import Decoded as Decoded
    from viasd_calib.planning.costs import ReplayCosts as ReplayCosts
    from viasd_calib.planning.search import Predicted as Predicted
    from viasd_calib.planning.search import Predictions as Predictions
    from viasd_calib.profiling.recording import TypicalRound as TypicalRound
    from viasd_calib.slim.forward import RoutedModel as RoutedModel
    from viasd_calib.traces import on_policy as on_policy
    from viasd_calib.traces.agreement import DraftAgreement as DraftAgreement
    from viasd_calib.traces.capture import CaptureReport as CaptureReport
    from viasd_calib.traces.texts import TraceText as TraceText
    from viasd_calib.training.search.record import SearchResult as SearchResult
    from viasd_calib.training.search.record import SearchSettings as SearchSettings
