"""Learn, measure, compare and rewrite feature directions in language models, from gradients."""

__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradiend import corpora as corpora, zoo as zoo
    from gradiend.core import InputError as InputError, MissingExtraError as MissingExtraError
    from gradiend.data.creation import TextPredictionDataCreator as TextPredictionDataCreator
    from gradiend.data.examples import Examples as Examples
    from gradiend.data.examples import make_examples as make_examples, neutral_examples as neutral_examples
    from gradiend.data.forms import Columns as Columns
    from gradiend.data.output import TrainingData as TrainingData, load_created as load_created
    from gradiend.data.tags import SpacyTagSpec as SpacyTagSpec
    from gradiend.data.targets import PairedTextFilterConfig as PairedTextFilterConfig
    from gradiend.data.targets import TextFilterConfig as TextFilterConfig
    from gradiend.data.text import TextPreprocessConfig as TextPreprocessConfig
    from gradiend.delta import Delta as Delta
    from gradiend.evaluator.decoder import DecoderResult as DecoderResult, evaluate_decoder as evaluate_decoder
    from gradiend.evaluator.encoder import EncoderResult as EncoderResult, evaluate_encoder as evaluate_encoder
    from gradiend.gradients.check import check_model as check_model, estimate as estimate
    from gradiend.gradients.engine import accumulate as accumulate, encode as encode
    from gradiend.gradients.engine import pair_gradients as pair_gradients
    from gradiend.gradients.objectives import masked_lm as masked_lm, objective_for as objective_for
    from gradiend.gradients.rows import row_gradients as row_gradients
    from gradiend.gradients.store import GradientStore as GradientStore, write_store as write_store
    from gradiend.gradients.space import ParameterSpace as ParameterSpace
    from gradiend.model import GradiendModel as GradiendModel
    from gradiend.overlap import OverlapResult as OverlapResult, topk_overlap as topk_overlap
    from gradiend.pruning import PostPruneConfig as PostPruneConfig, PrePruneConfig as PrePruneConfig
    from gradiend.rewrite import rewrite_model as rewrite_model
    from gradiend.trainer.arguments import TrainingArguments as TrainingArguments
    from gradiend.trainer.text import TextPredictionTrainer as TextPredictionTrainer
    from gradiend.visualizer.convergence import plot_training_convergence as plot_training_convergence
    from gradiend.visualizer.decoder import plot_probability_shifts as plot_probability_shifts
    from gradiend.visualizer.encoder import plot_encoder_distributions as plot_encoder_distributions
    from gradiend.visualizer.topk import plot_topk_overlap as plot_topk_overlap
    from gradiend.network import GradiendConfig as GradiendConfig
    from gradiend.artifact import check_base as check_base
    from gradiend.delta import applied as applied
    from gradiend.trainer.callbacks import EarlyStopping as EarlyStopping
    from gradiend.trainer.callbacks import TrainerCallback as TrainerCallback
    from gradiend.trainer.reports import SeedReport as SeedReport
    from gradiend.trainer.records import TrainingRun as TrainingRun
    from gradiend.trainer.optimisation import LRSearchConfig as LRSearchConfig
    from gradiend.trainer.tuning import LRSearch as LRSearch
    from gradiend.trainer.tuning import NoConvergentLearningRate as NoConvergentLearningRate
    from gradiend.trainer.tuning import search_learning_rate as search_learning_rate
    from gradiend.trainer.seeds import train_seeds as train_seeds
    from gradiend.trainer.baselines import fit_mean_difference as fit_mean_difference
    from gradiend.trainer.spectral import SpectralFit as SpectralFit
    from gradiend.trainer.spectral import fit_spectral as fit_spectral
    from gradiend.trainer.stability import bootstrap as bootstrap
    from gradiend.trainer.solve import solve as solve
    from gradiend.evaluator.perplexity import pseudo_perplexity as pseudo_perplexity
    from gradiend.rewrite_checkpoint import rewrite_checkpoint as rewrite_checkpoint
    from gradiend.verification import RewriteReport as RewriteReport
    from gradiend.verification import verify_rewrite as verify_rewrite
    from gradiend.visualizer.changes import plot_changed_weights as plot_changed_weights
    from gradiend.visualizer.targets import plot_encoder_by_target as plot_encoder_by_target
    from gradiend.visualizer.scatter import plot_encoder_scatter as plot_encoder_scatter
    from gradiend.comparison import named_models as named_models
    from gradiend.overlap import overlap_of as overlap_of
    from gradiend.similarities import SimilarityResult as SimilarityResult
    from gradiend.similarities import similarity as similarity
    from gradiend.crossing import CrossEncoding as CrossEncoding
    from gradiend.crossing import cross_encode as cross_encode
    from gradiend.visualizer.heatmap import plot_comparison_heatmap as plot_comparison_heatmap
    from gradiend.visualizer.heatmap import plot_similarity_heatmap as plot_similarity_heatmap
    from gradiend.visualizer.heatmap import plot_cross_encoding as plot_cross_encoding
    from gradiend.children import PairDefinition as PairDefinition
    from gradiend.execution import LaunchExecutor as LaunchExecutor
    from gradiend.execution import SuiteError as SuiteError
    from gradiend.execution import run_tasks as run_tasks
    from gradiend.family import SuiteReport as SuiteReport
    from gradiend.family import SuiteResults as SuiteResults
    from gradiend.suite import TrainerSuite as TrainerSuite
    from gradiend.suite import SymmetricTrainerSuite as SymmetricTrainerSuite
    from gradiend.suite import PositiveTrainerSuite as PositiveTrainerSuite
    from gradiend.suite import TrainerCollection as TrainerCollection

# Where each public name lives. It is imported when it is first used, so that `import gradiend`
# loads neither torch nor transformers. The type checkers read the block above; a test keeps both equal.
_modules = ("corpora", "zoo")
_names = {
    "InputError": "core", "MissingExtraError": "core",
    "TextPredictionDataCreator": "data.creation", "TextFilterConfig": "data.targets",
    "PairedTextFilterConfig": "data.targets", "SpacyTagSpec": "data.tags", "TextPreprocessConfig": "data.text",
    "Columns": "data.forms", "TrainingData": "data.output", "load_created": "data.output",
    "Examples": "data.examples", "make_examples": "data.examples", "neutral_examples": "data.examples",
    "ParameterSpace": "gradients.space", "masked_lm": "gradients.objectives",
    "objective_for": "gradients.objectives", "accumulate": "gradients.engine", "encode": "gradients.engine",
    "pair_gradients": "gradients.engine", "row_gradients": "gradients.rows",
    "check_model": "gradients.check", "estimate": "gradients.check", "GradientStore": "gradients.store",
    "write_store": "gradients.store",
    "PrePruneConfig": "pruning", "PostPruneConfig": "pruning",
    "GradiendModel": "model", "Delta": "delta",
    "TrainingArguments": "trainer.arguments", "TextPredictionTrainer": "trainer.text",
    "EncoderResult": "evaluator.encoder", "evaluate_encoder": "evaluator.encoder",
    "DecoderResult": "evaluator.decoder", "evaluate_decoder": "evaluator.decoder",
    "rewrite_model": "rewrite",
    "OverlapResult": "overlap", "topk_overlap": "overlap",
    "plot_training_convergence": "visualizer.convergence",
    "plot_encoder_distributions": "visualizer.encoder",
    "plot_probability_shifts": "visualizer.decoder",
    "plot_topk_overlap": "visualizer.topk",
    "GradiendConfig": "network",
    "check_base": "artifact",
    "applied": "delta",
    "EarlyStopping": "trainer.callbacks",
    "TrainerCallback": "trainer.callbacks",
    "SeedReport": "trainer.reports",
    "TrainingRun": "trainer.records",
    "LRSearchConfig": "trainer.optimisation",
    "LRSearch": "trainer.tuning",
    "NoConvergentLearningRate": "trainer.tuning",
    "search_learning_rate": "trainer.tuning",
    "train_seeds": "trainer.seeds",
    "fit_mean_difference": "trainer.baselines",
    "SpectralFit": "trainer.spectral",
    "fit_spectral": "trainer.spectral",
    "bootstrap": "trainer.stability",
    "solve": "trainer.solve",
    "pseudo_perplexity": "evaluator.perplexity",
    "rewrite_checkpoint": "rewrite_checkpoint",
    "RewriteReport": "verification",
    "verify_rewrite": "verification",
    "plot_changed_weights": "visualizer.changes",
    "plot_encoder_by_target": "visualizer.targets",
    "plot_encoder_scatter": "visualizer.scatter",
    "named_models": "comparison",
    "overlap_of": "overlap",
    "SimilarityResult": "similarities",
    "similarity": "similarities",
    "CrossEncoding": "crossing",
    "cross_encode": "crossing",
    "plot_comparison_heatmap": "visualizer.heatmap",
    "plot_similarity_heatmap": "visualizer.heatmap",
    "plot_cross_encoding": "visualizer.heatmap",
    "PairDefinition": "children",
    "LaunchExecutor": "execution",
    "SuiteError": "execution",
    "run_tasks": "execution",
    "SuiteReport": "family",
    "SuiteResults": "family",
    "TrainerSuite": "suite",
    "SymmetricTrainerSuite": "suite",
    "PositiveTrainerSuite": "suite",
    "TrainerCollection": "suite",
}  # fmt: skip
__all__ = ["__version__", *_modules, *_names]


def __getattr__(name: str) -> object:
    if name in _modules:
        return import_module(f"{__name__}.{name}")
    if name in _names:
        return getattr(import_module(f"{__name__}.{_names[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
