//! `forebay:TreeRegressor` and `forebay:TreeClassifier`, operators that ONNX Runtime loads from this library.
//!
//! The attributes are those of ONNX's own two with the prefix `target_` for both, but: `modes` in place
//! of `nodes_modes` (numbers, see `pack`), `average` 1 or 0, `labels` always integers; and a regressor's
//! `number`, by which others find its trees, see `ensemble`. What a model
//! says in them is checked before any tree is walked.

#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::{null, null_mut};
use std::sync::Arc;

use ort_sys::{
    ONNXTensorElementDataType as Type, OrtApi, OrtApiBase, OrtCustomOp, OrtCustomOpDomain,
    OrtCustomOpInputOutputCharacteristic as Characteristic, OrtErrorCode, OrtKernelContext,
    OrtKernelInfo, OrtMemType, OrtSessionOptions, OrtStatusPtr, OrtValue,
};
use parking_lot::Mutex;

use super::ensemble::Ensemble;
use super::forest::Forest;
use super::ort::{Fault, floats, int, ints, ok, output, shape_of, slice_of};
use super::pack::Attributes;
use super::scores::{Classifier, Regressor, Transform};

/// Of the C interface; every later ONNX Runtime has it.
const API: u32 = 17;
const NAME: &CStr = c"forebay";

/// Made once: sessions keep it, whenever they end.
struct Domain(*mut OrtCustomOpDomain);

// SAFETY: it is written once, under the lock.
unsafe impl Send for Domain {}

static DOMAIN: Mutex<Domain> = Mutex::new(Domain(null_mut()));

enum Trees {
    Regressor(Arc<Ensemble>),
    Classifier(Forest, Classifier),
}

struct Kernel {
    api: *const OrtApi,
    trees: Trees,
}

/// The operator that a session calls by name.
struct Operator {
    table: OrtCustomOp,
    name: &'static CStr,
    classifies: bool,
}

// SAFETY: nothing in it is ever written after it was made.
unsafe impl Sync for Operator {}

static REGRESSOR: Operator = Operator::new(c"TreeRegressor", false);
static CLASSIFIER: Operator = Operator::new(c"TreeClassifier", true);

impl Operator {
    const fn new(name: &'static CStr, classifies: bool) -> Self {
        Self {
            table: OrtCustomOp {
                version: API,
                CreateKernel: None,
                GetName: Some(op_name),
                GetExecutionProviderType: Some(any_provider),
                GetInputType: Some(input_type),
                GetInputTypeCount: Some(input_count),
                GetOutputType: Some(output_type),
                GetOutputTypeCount: Some(output_count),
                KernelCompute: None,
                KernelDestroy: Some(destroy),
                GetInputCharacteristic: Some(required),
                GetOutputCharacteristic: Some(required),
                GetInputMemoryType: Some(memory),
                GetVariadicInputMinArity: None,
                GetVariadicInputHomogeneity: None,
                GetVariadicOutputMinArity: None,
                GetVariadicOutputHomogeneity: None,
                CreateKernelV2: Some(create),
                KernelComputeV2: Some(compute),
                InferOutputShapeFn: None,
                GetStartVersion: None,
                GetEndVersion: None,
                GetMayInplace: None,
                ReleaseMayInplace: None,
                GetAliasMap: None,
                ReleaseAliasMap: None,
            },
            name,
            classifies,
        }
    }

    /// # Safety
    /// `op` is the table of one of the two operators, whose first field it is.
    unsafe fn of<'a>(op: *const OrtCustomOp) -> &'a Self {
        let own = &raw const CLASSIFIER.table;
        if op == own { &CLASSIFIER } else { &REGRESSOR }
    }
}

/// ONNX Runtime calls this when a session's options register the library.
///
/// # Safety
/// The pointers are ONNX Runtime's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn RegisterCustomOps(
    options: *mut OrtSessionOptions,
    base: *const OrtApiBase,
) -> OrtStatusPtr {
    unsafe {
        let api = ((*base).GetApi)(API);
        let Some(table) = api.as_ref() else {
            return OrtStatusPtr::default();
        };
        let mut made = DOMAIN.lock();
        let mut status = OrtStatusPtr::default();
        if made.0.is_null() {
            status = (table.CreateCustomOpDomain)(NAME.as_ptr(), &raw mut made.0);
            for op in [&REGRESSOR, &CLASSIFIER] {
                if status.0.is_null() {
                    status = (table.CustomOpDomain_Add)(made.0, &raw const op.table);
                }
            }
        }
        if status.0.is_null() {
            status = (table.AddCustomOpDomain)(options, made.0);
        }
        status
    }
}

unsafe extern "system" fn op_name(op: *const OrtCustomOp) -> *const c_char {
    unsafe { Operator::of(op).name.as_ptr() }
}

unsafe extern "system" fn any_provider(_: *const OrtCustomOp) -> *const c_char {
    null()
}

unsafe extern "system" fn input_count(_: *const OrtCustomOp) -> usize {
    1
}

unsafe extern "system" fn input_type(_: *const OrtCustomOp, _: usize) -> Type {
    Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
}

unsafe extern "system" fn output_count(op: *const OrtCustomOp) -> usize {
    unsafe { 1 + usize::from(Operator::of(op).classifies) }
}

unsafe extern "system" fn output_type(op: *const OrtCustomOp, index: usize) -> Type {
    let labels = unsafe { Operator::of(op).classifies } && index == 0;
    if labels {
        Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64
    } else {
        Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
    }
}

unsafe extern "system" fn required(_: *const OrtCustomOp, _: usize) -> Characteristic {
    Characteristic::INPUT_OUTPUT_REQUIRED
}

unsafe extern "system" fn memory(_: *const OrtCustomOp, _: usize) -> OrtMemType {
    OrtMemType::OrtMemTypeDefault
}

unsafe extern "system" fn create(
    op: *const OrtCustomOp,
    api: *const OrtApi,
    info: *const OrtKernelInfo,
    kernel: *mut *mut c_void,
) -> OrtStatusPtr {
    told(api, || unsafe {
        let made = kernel_of(Operator::of(op).classifies, api, info)?;
        *kernel = Box::into_raw(Box::new(made)).cast();
        Ok(())
    })
}

unsafe extern "system" fn destroy(kernel: *mut c_void) {
    drop(unsafe { Box::from_raw(kernel.cast::<Kernel>()) });
}

unsafe extern "system" fn compute(
    kernel: *mut c_void,
    context: *mut OrtKernelContext,
) -> OrtStatusPtr {
    let kernel = unsafe { &*kernel.cast::<Kernel>() };
    told(kernel.api, || unsafe { run(kernel, context) })
}

/// What it does, as a status; a panic is a fault of the call and not the end of the process.
fn told(api: *const OrtApi, work: impl FnOnce() -> Result<(), Fault>) -> OrtStatusPtr {
    let why = match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(())) => return OrtStatusPtr::default(),
        Ok(Err(Fault(why))) => why,
        Err(_) => "the trees could not be walked".into(),
    };
    let why = CString::new(why).unwrap_or_default();
    unsafe { ((*api).CreateStatus)(OrtErrorCode::ORT_INVALID_ARGUMENT, why.as_ptr()) }
}

unsafe fn kernel_of(
    classifies: bool,
    api: *const OrtApi,
    info: *const OrtKernelInfo,
) -> Result<Kernel, Fault> {
    let ints = |name: &CStr| unsafe { ints(api, info, name) };
    let floats = |name: &CStr| unsafe { floats(api, info, name) };
    let labels = ints(c"labels");
    let attributes = Attributes {
        tree_ids: ints(c"nodes_treeids"),
        node_ids: ints(c"nodes_nodeids"),
        feature_ids: ints(c"nodes_featureids"),
        values: floats(c"nodes_values"),
        modes: ints(c"modes"),
        true_node_ids: ints(c"nodes_truenodeids"),
        false_node_ids: ints(c"nodes_falsenodeids"),
        missing_tracks_true: ints(c"nodes_missing_value_tracks_true"),
        target_tree_ids: ints(c"target_treeids"),
        target_node_ids: ints(c"target_nodeids"),
        target_ids: ints(c"target_ids"),
        target_weights: floats(c"target_weights"),
        targets: if classifies {
            labels.len()
        } else {
            unsafe { int(api, info, c"n_targets") }
                .and_then(|n| usize::try_from(n).ok())
                .unwrap_or(0)
        },
    };
    let forest = Forest::new(&attributes)?;
    let base = floats(c"base_values");
    let targets = forest.targets();
    let one_of_two = classifies && targets == 2 && base.len() == 1;
    if !base.is_empty() && base.len() != targets && !one_of_two {
        return Err(format!("{} base values for {targets} targets", base.len()).into());
    }
    let trees = if classifies {
        if labels.len() < 2 {
            return Err(format!("{} classes", labels.len()).into());
        }
        let code = unsafe { int(api, info, c"transform") };
        let transform = code
            .and_then(Transform::numbered)
            .ok_or_else(|| format!("transform {code:?}"))?;
        let ids = &attributes.target_ids;
        let finish = Classifier {
            transform,
            one_sided: labels.len() == 2 && ids.iter().all(|id| *id == ids[0]),
            positive: attributes.target_weights.iter().all(|w| *w >= 0.0),
            labels,
            base,
        };
        Trees::Classifier(forest, finish)
    } else {
        let average = unsafe { int(api, info, c"average") } == Some(1);
        #[allow(clippy::cast_precision_loss)]
        let count = forest.trees() as f32;
        let finish = Regressor {
            base,
            average: average.then_some(count),
        };
        let made = Arc::new(Ensemble::new(forest, finish));
        if let Some(number) = unsafe { int(api, info, c"number") } {
            made.publish(number);
        }
        Trees::Regressor(made)
    };
    Ok(Kernel { api, trees })
}

unsafe fn run(kernel: &Kernel, context: *mut OrtKernelContext) -> Result<(), Fault> {
    unsafe {
        let api = &*kernel.api;
        let mut input: *const OrtValue = null();
        ok(
            api,
            (api.KernelContext_GetInput)(context, 0, &raw mut input),
        )?;
        let shape = shape_of(api, input)?;
        let (rows, columns) = match shape[..] {
            [columns] => (1, columns),
            [rows, columns] => (rows, columns),
            _ => return Err(format!("an input of {} dimensions", shape.len()).into()),
        };
        let (least, targets) = match &kernel.trees {
            Trees::Regressor(all) => (all.features(), all.targets()),
            Trees::Classifier(forest, _) => (forest.features(), forest.targets()),
        };
        if columns < least.max(1) {
            return Err(format!("rows of {columns} features; {least} are needed").into());
        }
        let x = slice_of::<f32>(api, input.cast_mut(), rows * columns)?;
        match &kernel.trees {
            Trees::Regressor(all) => {
                let out = output(api, context, 0, &[rows, targets])?;
                all.run(x, columns, out);
            }
            Trees::Classifier(forest, finish) => {
                let labels = output::<i64>(api, context, 0, &[rows])?;
                let out = output(api, context, 1, &[rows, targets])?;
                let mut has = vec![false; out.len()];
                forest.sum(x, columns, out, &mut has);
                let each = out.chunks_mut(targets).zip(has.chunks(targets));
                for (label, (row, has)) in labels.iter_mut().zip(each) {
                    *label = finish.finish(row, has);
                }
            }
        }
        Ok(())
    }
}
