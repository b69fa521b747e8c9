//! How a call is answered here: its records make a table, a forest's values for it go between bytes that
//! Python has written once. Knows protobuf's wire format, and no message of anybody's contract.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::rows::{self, Number};
use crate::trees::ensemble::Ensemble;

/// What a request's records are.
pub enum Table {
    /// Rows of google.protobuf.Struct, with these features.
    Rows(Vec<Number>),
    /// One tensor of float32 in so many bytes, of rows with so many columns.
    Raw { bytes: usize, columns: usize },
}

/// What stands behind the values.
pub struct Ending {
    pub bytes: Vec<u8>,
    /// Where the milliseconds that the work took go, as a double.
    pub took_at: Option<usize>,
}

/// See the module.
pub struct Recipe {
    /// The field of a request that holds its records.
    pub field: u64,
    pub table: Table,
    pub forest: Arc<Ensemble>,
    /// What an answer begins with.
    pub before: Vec<u8>,
    /// What stands before each value.
    pub each: Vec<u8>,
    /// Values are doubles; else floats.
    pub double: bool,
    /// By the number of rows, from one on. Requests of other numbers are not answered here.
    pub endings: Vec<Option<Ending>>,
}

/// An answer.
pub struct Answer {
    pub payload: Bytes,
    pub rows: usize,
    pub took: Duration,
}

impl Recipe {
    /// The answer to a request, whose records stand at these places. None where there is anything odd:
    /// Python knows what to say.
    pub fn answer(&self, message: &[u8], records: &[Range<usize>]) -> Option<Answer> {
        let began = Instant::now();
        let (x, columns) = self.read(message, records)?;
        let rows = x.len() / columns;
        let ending = self.endings.get(rows.checked_sub(1)?)?.as_ref()?;
        let mut values = vec![0.0; rows];
        self.forest.run(&x, columns, &mut values);
        let width = if self.double { 8 } else { 4 };
        let size = self.before.len() + rows * (self.each.len() + width) + ending.bytes.len();
        let mut payload = Vec::with_capacity(size);
        payload.extend_from_slice(&self.before);
        for value in values {
            payload.extend_from_slice(&self.each);
            if self.double {
                payload.extend_from_slice(&f64::from(value).to_le_bytes());
            } else {
                payload.extend_from_slice(&value.to_le_bytes());
            }
        }
        let end = payload.len();
        payload.extend_from_slice(&ending.bytes);
        let took = began.elapsed();
        if let Some(at) = ending.took_at {
            let ms = (took.as_secs_f64() * 1e6).round() / 1e3;
            payload[end + at..end + at + 8].copy_from_slice(&ms.to_le_bytes());
        }
        Some(Answer {
            payload: payload.into(),
            rows,
            took,
        })
    }

    /// The values, row by row, and how many each row has.
    fn read(&self, message: &[u8], records: &[Range<usize>]) -> Option<(Vec<f32>, usize)> {
        match &self.table {
            Table::Rows(numbers) => {
                if records.len() > self.endings.len() {
                    return None;
                }
                let mut x = Vec::with_capacity(records.len() * numbers.len());
                for record in records {
                    let row = rows::read(&message[record.clone()], numbers, &[])?;
                    x.extend(row.numbers.iter().map(|&v| v as f32));
                }
                Some((x, numbers.len()))
            }
            &Table::Raw { bytes, columns } => {
                let [record] = records else { return None };
                let data = &message[record.clone()];
                let whole = data.len() == bytes && bytes % (4 * columns) == 0;
                let (values, _) = data.as_chunks::<4>();
                whole.then(|| {
                    (
                        values.iter().map(|&v| f32::from_le_bytes(v)).collect(),
                        columns,
                    )
                })
            }
        }
    }

    /// What makes it unfit to run: places that are not there, rows that are too short for the trees.
    pub fn fault(&self) -> Option<&'static str> {
        let columns = match &self.table {
            Table::Rows(numbers) => numbers.len(),
            Table::Raw { columns, .. } => *columns,
        };
        if columns == 0 || columns < self.forest.features() {
            return Some("the rows are too short for the trees");
        }
        let beyond = |e: &Ending| e.took_at.is_some_and(|at| at + 8 > e.bytes.len());
        let out = self.endings.iter().flatten().any(beyond);
        out.then_some("a place beyond the bytes")
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // records are ranges
pub mod tests {
    use super::*;
    use crate::trees::ensemble::tests::stump;

    /// A recipe for `x[0] <= 1 ? 10 : 20`, of tensors with two columns and up to two rows.
    pub fn raw(bytes: usize) -> Recipe {
        let ending = |n: u8| {
            Some(Ending {
                bytes: vec![0xee, n, 0, 0, 0, 0, 0, 0, 0, 0],
                took_at: Some(2),
            })
        };
        Recipe {
            field: 2,
            table: Table::Raw { bytes, columns: 2 },
            forest: stump(),
            before: b"<".to_vec(),
            each: b"|".to_vec(),
            double: false,
            endings: vec![ending(1), ending(2)],
        }
    }

    fn floats(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    #[test]
    fn values_stand_between_the_bytes() {
        let message = floats(&[0.5, 9.0, 1.5, 9.0]);
        let answer = raw(16).answer(&message, &[0..16]).unwrap();
        assert_eq!(answer.rows, 2);
        let expected = [
            b"<|".to_vec(),
            floats(&[10.0]),
            b"|".to_vec(),
            floats(&[20.0]),
            vec![0xee, 2],
        ];
        let (start, ms) = answer.payload.split_at(answer.payload.len() - 8);
        assert_eq!(start, expected.concat());
        assert!(f64::from_le_bytes(ms.try_into().unwrap()) < 1e3);
    }

    #[test]
    fn what_is_odd_is_left_to_python() {
        let message = floats(&[0.5; 8]);
        assert!(raw(8).answer(&message, &[0..16]).is_none(), "another size");
        assert!(
            raw(8).answer(&message, &[0..8, 8..16]).is_none(),
            "two tensors"
        );
        assert!(
            raw(32).answer(&message, &[0..32]).is_none(),
            "too many rows"
        );
        assert!(raw(12).answer(&message, &[0..12]).is_none(), "half a row");
        assert!(raw(0).answer(&message, &[0..0]).is_none(), "no row");
    }

    #[test]
    fn rows_are_read_by_name() {
        let number = |name: &str| Number {
            name: name.into(),
            least: 0.0,
            most: 5.0,
            needed: true,
        };
        let mut recipe = raw(0);
        recipe.table = Table::Rows(vec![number("a"), number("b")]);
        recipe.double = true;
        let pair = |name: u8, value: f64| {
            let bytes = value.to_le_bytes();
            [&[0x0a, 14, 0x0a, 1, name, 0x12, 9, 0x11][..], &bytes].concat()
        };
        let row = [pair(b'b', 3.0), pair(b'a', 2.0)].concat();
        let answer = recipe.answer(&row, &[0..32]).unwrap();
        assert_eq!(answer.payload[2..10], 20_f64.to_le_bytes());
        let odd = [pair(b'b', 3.0), pair(b'a', 5.5)].concat();
        assert!(recipe.answer(&odd, &[0..32]).is_none(), "to be warned of");
        assert!(recipe.answer(&row, &[0..16]).is_none(), "one is missing");
        assert!(
            recipe.answer(&row, &[0..32, 0..32, 0..32]).is_none(),
            "three rows"
        );
    }

    #[test]
    fn recipes_that_cannot_be_are_told() {
        let mut recipe = raw(8);
        assert!(recipe.fault().is_none());
        recipe.endings[0].as_mut().unwrap().took_at = Some(3);
        assert!(recipe.fault().is_some());
        let mut recipe = raw(8);
        recipe.table = Table::Raw {
            bytes: 0,
            columns: 0,
        };
        assert!(recipe.fault().is_some());
    }
}
