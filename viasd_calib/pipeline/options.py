"""The options of all jobs; a command's parser is made of its class. What several jobs take is in ``shared_options``.

A class's summary is the command's help, and its arguments are the help of its options. Annotations are evaluated here,
not postponed, since the parser reads the ranges of numbers off them.
"""

from collections.abc import Sequence
from typing import Any, Literal

from viasd_calib.choices import (
    FRACTIONS,
    SEARCH_METHODS,
    CertificateLossName,
    StrategyName,
)
from viasd_calib.errors import UsageError
from viasd_calib.option_types import (
    BlockLength,
    Count,
    DraftLength,
    Inside,
    MaxPending,
    Nonnegative,
    OptionalCount,
    Positive,
    Seed,
    Share,
    ShareOrNone,
    check_options,
)
from viasd_calib.pipeline.shared_options import (
    BackendModels,
    FitModels,
    FittedModels,
    Models,
    OffloadOptions,
    PromptSource,
    SpecModels,
    UnseenPrompts,
    options,
)
from viasd_calib.prompts import Split, SplitShares
from viasd_calib.spec import Audit, DType


@options
class CaptureOptions(OffloadOptions, PromptSource, FitModels):
    """Log what draft model and verifier predict on prompts; a run that was stopped goes on where it was.

    Args:
        out: folder for the trace shards.
        verifier: hub id, folder, .gguf file or "smollm2-135m"; where it is left out the spec's, or smollm2-135m.
        draft: "prompt_lookup", a folder with a shallow drafter, a model with the verifier's vocabulary,
            "prompt_lookup+" and one of the latter two for both together, or "none"; "int8:" or "int4:" before
            folder or model gives it integer weights, then "window128:" lets it read the last 128 tokens of a prompt.
        split: take this split's prompts alone, by hash; null takes all.
        max_new_tokens: longest answer.
        batch_size: texts generated together; also the texts of a shard.
        top_k: tokens of each distribution that are logged.
        draft_length: drafts are logged as they stand in blocks of 1 to so many drafted tokens: as many as it will
            decode with.
        temperature: 0 for greedy texts.
        seed: of sampling.
        spec: let the three-tier decoder of this routing spec write the texts, in place of the verifier, whose own
            choice is logged at each place; proposals are those of ``draft``, whatever the spec decodes with.
        audit: of that decoder, in place of the spec's; with "strict" the texts are the verifier's own.
    """

    out: str
    draft: str = "prompt_lookup"
    split: Split | None = "fit"
    max_new_tokens: Count = 128
    batch_size: Count = 32
    top_k: Count = 16
    draft_length: BlockLength = 6
    temperature: Nonnegative = 0.0
    seed: Seed = 0
    spec: str | None = None
    audit: Audit | None = None


@options
class CalibrateOptions(OffloadOptions, PromptSource, FittedModels):
    """Propose thresholds from traces, decode the calibrate split with each, and certify the fastest that holds.

    Args:
        fit: folder that ``viasd fit`` wrote; with ``cost``, that ``viasd frontier`` wrote.
        out: folder for the result.
        cost: take the member of the frontier that agrees best among those whose slim pass costs at most this share of
            a full one, measured at width 4.
        loss: what is bounded, of each prompt. token_divergence is the share of its tokens that the verifier would not
            have chosen; any_divergence whether there is one; overshoot how far below the verifier's choice they lie,
            and overshoot_tail the share of those that lie very far.
        max_loss: largest mean over prompts of the loss of each, whatever their lengths.
        confidence: that the bound holds on unseen prompts.
        attempt: number of this attempt on these calibrate prompts, at least: those with this fit are counted, which are
            noted beside it, and any with other fits are yours to count. Attempt k has the level (1 - confidence) / 2^k.
        max_new_tokens: longest answer.
        fractions: rising; a candidate is proposed at each of these fractions of max_loss.
        allow_uncertified: go on with fewer prompts than can certify max_loss, to a spec that decodes exactly.
        draft_length: most tokens drafted a round.
        dtype: number format of the verifier; where it is left out float32, or for low bits the one in which the fit
            found slim passes cheaper than full ones, where this machine has kernels in it.
        max_pending: most tokens that may wait for the full verifier; good slim verifiers, such as low bits, bear 24
            to 32, those that agree less often fewer.
    """

    fit: str
    out: str
    cost: Share | None = None
    loss: CertificateLossName = "token_divergence"
    max_loss: Inside = 0.02
    confidence: Inside = 0.95
    attempt: Count = 1
    max_new_tokens: Count = 64
    fractions: Sequence[Share] = FRACTIONS
    allow_uncertified: bool = False
    draft_length: DraftLength = 6
    max_pending: MaxPending = 24

    def __post_init__(self) -> None:
        check_options(self)
        if [*self.fractions] != sorted(set(self.fractions)) or not self.fractions:
            raise UsageError(f"fractions is {[*self.fractions]}; give one or more, each larger than the one before")


@options
class ExportOptions(FittedModels):
    """Write the routing spec, with its tensors beside it.

    Args:
        calibrate: folder that ``viasd calibrate`` wrote.
        out: path of the spec (JSON).
        audit: "strict" for the fastest exact policy, "off" for the certified one; the faster of the two where it is
            left out.
        dtype: number format of the verifier; where it is left out the one that was calibrated in.
        evidence: JSON of ``viasd bench`` to record as evidence; it must have measured this policy, with a spec that was
            exported before.
        fit: where the fit is that was calibrated, if not where it was then.
    """

    calibrate: str
    out: str
    audit: Audit | None = None
    evidence: str | None = None
    fit: str | None = None


@options
class ProfileOptions(BackendModels):
    """Measure what draft steps, slim and full passes, the output head and decoded tokens take on this machine.

    Args:
        json: where the profile is written.
        widths: new tokens of a pass.
        contexts: cached tokens before them; also the lengths of the random texts that decoding is timed after.
        batches: texts at once; draft steps are of one text.
        repeats: timed rounds over everything, from which median and quartiles are taken.
        plot: draw a picture of the profile here (.png, .svg or .pdf).
    """

    json: str
    widths: Sequence[int] = (1, 2, 4, 8, 16)
    contexts: Sequence[int] = (128, 512, 2048)
    batches: Sequence[int] = (1, 4)
    repeats: int = 15
    plot: str | None = None


@options
class PlanOptions(PromptSource, BackendModels):
    """Plan which policy decodes at which context length and batch, and write the spec with that plan.

    Args:
        traces: trace folders of greedy texts, comma-separated.
        out: where the spec is written, in the folder of the one that is read.
        contexts: cached tokens to plan for.
        batches: texts decoded together to plan for: one number, or several, as a list or comma-separated.
        profile: a latency profile of viasd profile at these contexts and batches; measured where it is left out.
        trace_tokens: generated tokens of the traces to replay, of whole texts drawn by hash.
        max_new_tokens: longest answer where the fastest policies are decoded.
        limit: take this many prompts of the calibrate split for that, at each context those about as long; null takes
            all.
        certified: decode with the certified candidates that the spec lists, too, and write the fastest in place of a
            plan where it is shown to be faster than exact decoding; its text may diverge, within the certified bound.
    """

    traces: str
    out: str
    contexts: Sequence[int] = (128, 512, 2048)
    batches: int | str | Sequence[int] = 1
    profile: str | None = None
    trace_tokens: Count = 4096
    max_new_tokens: Count = 64
    limit: Count | None = 24
    certified: bool = False


@options
class BenchOptions(UnseenPrompts, BackendModels):
    """Compare decoding strategies on a prompt file: same weights, same drafter, interleaved prompt by prompt.

    Args:
        json: where the result is written.
        methods: strategies, as a list or comma-separated; an unknown one is answered with the list of those there are.
            transformers, its own generate, always runs eager.
        audit: of three_tier, in place of the spec's.
        drafting_pays_at: share of a text's drafted tokens that must be kept for drafting to go on unreduced, in place
            of the spec's; 0 for always.
        batch: texts decoded together: one number, or several, each measured by itself, as a list or comma-separated.
            transformers takes one text at a time alone.
        seed: of the order of strategies, of the batches and of the bootstrap.
    """

    json: str
    methods: str | Sequence[str] = "autoregressive,speculative,three_tier"
    audit: Audit | None = None
    drafting_pays_at: ShareOrNone | None = None
    batch: int | str | Sequence[int] = 1
    seed: Seed = 0


@options
class ReportOptions(UnseenPrompts, SpecModels):
    """Write one self-contained HTML page: tables, route, gates, tiers, speed against loss, a text and a round.

    Args:
        bench: JSON that ``viasd bench`` wrote; it must have measured this spec's policy. A notice says where it
            measured other prompts than those that are decoded here.
        out: path of the page.
        calibrate: folder that ``viasd calibrate`` wrote, for the gates' reliability and the candidates tested.
        fit: where the fit is that was calibrated, if not where it was then.
    """

    bench: str
    out: str
    calibrate: str | None = None
    fit: str | None = None
    split: Split | None = "test"
    limit: Count | None = 8
    max_new_tokens: Count = 96


@options
class RouteQualityOptions(UnseenPrompts, BackendModels):
    """Measure how well the slim verifier predicts the full one, how well gates are calibrated, and what a pass costs.

    Args:
        json: where the result is written.
        batch_size: prompts answered at once; one unless given: in bfloat16 a batch rounds otherwise than the single
            texts that are compared, so that its answers are not everywhere the verifier's own choice.
    """

    json: str
    batch_size: Count = 1


@options
class SearchOptions(Models):
    """Choose a route in several ways, each with the same texts and budget, and compare the routes on held-back texts.

    Args:
        traces: trace folders, comma-separated.
        json: where the result is written.
        target_cost: measured cost of a slim pass over that of a full one, bridges left out.
        methods: a list, or comma-separated; an unknown one is answered with the list of those there are.
        budget: passes over the search's texts that each method may take.
        limit_texts: texts to search on, a fifth of them to compare routes on, the others for bridges; also the most
            that the chosen routes are compared on. Null takes all.
        bridges: whether bridges replace skipped runs.
        bridge_rank: of the bridges; null for full ones.
        keep_layers: layers that are never skipped; negative ones count from the end.
        split: the split of prompts whose texts are taken, by hash.
        shares: shares of the splits.
        validation_share: prompts of the split that are held back, by hash.
        seed: of the methods that draw.
        dtype: number format of the verifier.
    """

    traces: str
    json: str
    target_cost: Share = 0.5
    methods: str | Sequence[str] = ",".join(SEARCH_METHODS)
    budget: Count = 200
    limit_texts: Count | None = 60
    bridges: bool = True
    bridge_rank: Count | None = None
    keep_layers: Sequence[int] = (0, -1)
    split: Split = "fit"
    shares: SplitShares | None = None
    validation_share: Inside = 0.15
    seed: Seed = 0
    dtype: DType = "float32"


@options
class GenerateOptions(BackendModels):
    """Answer a prompt with a routing spec, streaming each token once it is final; or the prompts of a file.

    Args:
        prompt: the user's turn.
        prompts: in its place, a prompt file or what else viasd bench takes; each prompt's answers are a line of JSON.
        limit: take the first so many of these; null takes all.
        system: the system's message; where it is left out the chat template decides.
        chat_template_kwargs: what the chat template is told beside them, as JSON: '{"enable_thinking": false}'.
        max_new_tokens: longest answer.
        method: strategy, one of those of viasd bench but transformers.
        audit: in place of the spec's own.
        drafting_pays_at: share of the text's drafted tokens that must be kept for drafting to go on unreduced, in place
            of the spec's own; 0 for always.
        show_tiers: show which tier decided each token: by colour, or where the output is no terminal, in a line a
            token with the tier, a tab and the text as JSON.
        temperature: 0 takes the most probable token.
        top_k: draw from so many of the most probable tokens; 0 for all.
        top_p: draw from the smallest set of tokens with this share of the mass.
        min_p: draw from tokens with at least this share of the largest probability.
        repetition_penalty: divides the scores of tokens that the text holds already.
        seed: of the draws.
        log: append to this file what catch-up finds of each text, a line of JSON, for viasd monitor; of greedy texts
            of a spec with a certified bound. A text takes one more full pass where tokens are pending at its end.
        fallback: with log, once the certified bound is exceeded there, decode the other texts with audit strict.
        level: with log, probability with which a bound that holds is ever called exceeded.
    """

    prompt: str | None = None
    prompts: str | None = None
    limit: Count | None = None
    system: str | None = None
    chat_template_kwargs: dict[Any, Any] | None = None
    max_new_tokens: Count = 128
    method: StrategyName = "three_tier"
    audit: Audit | None = None
    drafting_pays_at: ShareOrNone | None = None
    show_tiers: bool = False
    temperature: Nonnegative = 0.0
    top_k: OptionalCount = 0
    top_p: Share = 1.0
    min_p: ShareOrNone = 0.0
    repetition_penalty: Positive = 1.0
    seed: Seed = 0
    log: str | None = None
    fallback: Literal["strict"] | None = None
    level: Inside = 0.05


@options
class MonitorOptions:
    """Test whether the loss bound of a certificate still holds, by logs of viasd generate; exit with 1 if not.

    Args:
        files: logs, in the order in which their texts were decoded.
        spec: path of the routing spec that decoded them.
        level: probability with which a bound that holds is ever called exceeded.
        json: where the result is written, too.
        skip_others: leave out texts of other specs, which are refused by default.
    """

    files: list[str]
    spec: str
    level: Inside = 0.05
    json: str | None = None
    skip_others: bool = False
