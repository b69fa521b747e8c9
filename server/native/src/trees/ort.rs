//! The part of ONNX Runtime's C interface that the operators need, with results in place of statuses.

#![allow(unsafe_code)]

use std::ffi::CStr;
use std::ptr::null_mut;

use ort_sys::{OrtApi, OrtKernelContext, OrtKernelInfo, OrtStatusPtr, OrtValue};

/// Why there is no answer, for ONNX Runtime to tell.
pub(super) struct Fault(pub(super) String);

impl From<String> for Fault {
    fn from(why: String) -> Self {
        Self(why)
    }
}

pub(super) unsafe fn shape_of(api: &OrtApi, value: *const OrtValue) -> Result<Vec<usize>, Fault> {
    unsafe {
        let mut info = null_mut();
        ok(api, (api.GetTensorTypeAndShape)(value, &raw mut info))?;
        let mut count = 0;
        let mut dims = Vec::new();
        let mut read = ok(api, (api.GetDimensionsCount)(info, &raw mut count));
        if read.is_ok() {
            dims.resize(count, 0);
            read = ok(api, (api.GetDimensions)(info, dims.as_mut_ptr(), count));
        }
        (api.ReleaseTensorTypeAndShapeInfo)(info);
        read?;
        Ok(dims
            .into_iter()
            .map(|d| usize::try_from(d).unwrap_or(0))
            .collect())
    }
}

pub(super) unsafe fn slice_of<'a, T>(
    api: &OrtApi,
    value: *mut OrtValue,
    len: usize,
) -> Result<&'a mut [T], Fault> {
    if len == 0 {
        return Ok(&mut []);
    }
    unsafe {
        let mut data = null_mut();
        ok(api, (api.GetTensorMutableData)(value, &raw mut data))?;
        Ok(std::slice::from_raw_parts_mut(data.cast(), len))
    }
}

pub(super) unsafe fn output<'a, T>(
    api: &OrtApi,
    context: *mut OrtKernelContext,
    index: usize,
    shape: &[usize],
) -> Result<&'a mut [T], Fault> {
    let dims: Vec<i64> = shape
        .iter()
        .map(|&d| i64::try_from(d).unwrap_or(0))
        .collect();
    let mut value = null_mut();
    unsafe {
        let made = (api.KernelContext_GetOutput)(
            context,
            index,
            dims.as_ptr(),
            dims.len(),
            &raw mut value,
        );
        ok(api, made)?;
        slice_of(api, value, shape.iter().product())
    }
}

/// An attribute of so many numbers; empty where the node has none of that name.
pub(super) unsafe fn ints(api: *const OrtApi, info: *const OrtKernelInfo, name: &CStr) -> Vec<i64> {
    let get = unsafe { (*api).KernelInfoGetAttributeArray_int64 };
    unsafe { array(api, |out, len| get(info, name.as_ptr(), out, len)) }
}

pub(super) unsafe fn floats(
    api: *const OrtApi,
    info: *const OrtKernelInfo,
    name: &CStr,
) -> Vec<f32> {
    let get = unsafe { (*api).KernelInfoGetAttributeArray_float };
    unsafe { array(api, |out, len| get(info, name.as_ptr(), out, len)) }
}

pub(super) unsafe fn array<T: Clone + Default>(
    api: *const OrtApi,
    get: impl Fn(*mut T, *mut usize) -> OrtStatusPtr,
) -> Vec<T> {
    let api = unsafe { &*api };
    let mut len = 0;
    let mut out = Vec::new();
    if ok(api, get(null_mut(), &raw mut len)).is_ok() {
        out.resize(len, T::default());
        if len > 0 && ok(api, get(out.as_mut_ptr(), &raw mut len)).is_err() {
            out.clear();
        }
    }
    out
}

pub(super) unsafe fn int(
    api: *const OrtApi,
    info: *const OrtKernelInfo,
    name: &CStr,
) -> Option<i64> {
    let mut out = 0;
    let api = unsafe { &*api };
    let got = unsafe { (api.KernelInfoGetAttribute_int64)(info, name.as_ptr(), &raw mut out) };
    ok(api, got).ok().map(|()| out)
}

/// A status of ONNX Runtime as a result; it is released.
pub(super) fn ok(api: &OrtApi, status: OrtStatusPtr) -> Result<(), Fault> {
    if status.0.is_null() {
        return Ok(());
    }
    unsafe {
        let why = CStr::from_ptr((api.GetErrorMessage)(status.0));
        let why = why.to_string_lossy().into_owned();
        (api.ReleaseStatus)(status.0);
        Err(Fault(why))
    }
}
