//! Rows of google.protobuf.Struct, read by their features' names. Knows protobuf's wire format as
//! far as `Struct` and `Value` need it, and no message of anybody's contract.

use std::collections::HashSet;

use crate::wire::{Field, field};

/// What a row holds for its features. `None` = odd: not this reader's business.
pub struct Row<'a> {
    /// NaN where missing.
    pub numbers: Vec<f64>,
    /// Empty where missing.
    pub strings: Vec<&'a str>,
}

/// A feature that takes numbers, and which of them raise no question.
pub struct Number {
    pub name: String,
    pub least: f64,
    pub most: f64,
    /// May not be missing.
    pub needed: bool,
}

impl Number {
    pub fn takes(&self, value: f64) -> bool {
        if value.is_nan() {
            !self.needed
        } else {
            value.is_finite() && (self.least..=self.most).contains(&value)
        }
    }
}

/// A feature that takes strings, and which of them raise no question.
pub struct Text {
    pub name: String,
    /// Empty: any.
    pub known: HashSet<String>,
    /// May not be missing.
    pub needed: bool,
}

impl Text {
    pub fn takes(&self, value: &str) -> bool {
        if value.is_empty() {
            !self.needed
        } else {
            self.known.is_empty() || self.known.contains(value)
        }
    }
}

/// Reads one row. `None` when it is malformed, has a name that is unknown, or a value that its
/// feature does not take.
pub fn read<'a>(data: &'a [u8], numbers: &[Number], strings: &[Text]) -> Option<Row<'a>> {
    let mut row = Row {
        numbers: vec![f64::NAN; numbers.len()],
        strings: vec![""; strings.len()],
    };
    let mut rest = data;
    let mut next = 0; // callers mostly keep an order: look there first
    while !rest.is_empty() {
        let (1, Field::Bytes(entry)) = field(&mut rest)? else {
            return None;
        };
        let (name, value) = pair(entry)?;
        if let Some(at) = find(numbers, |n| n.name == name, next) {
            next = at + 1;
            row.numbers[at] = match value {
                Value::Missing => f64::NAN,
                Value::Number(n) => n,
                Value::Bool(b) => f64::from(u8::from(b)),
                Value::Text(_) => return None,
            };
        } else if let Some(at) = find(strings, |t| t.name == name, 0) {
            row.strings[at] = match value {
                Value::Missing => "",
                Value::Text(text) => text,
                Value::Number(_) | Value::Bool(_) => return None,
            };
        } else {
            return None;
        }
    }
    let good = numbers.iter().zip(&row.numbers).all(|(n, &v)| n.takes(v))
        && strings.iter().zip(&row.strings).all(|(t, v)| t.takes(v));
    good.then_some(row)
}

fn find<T>(all: &[T], is: impl Fn(&T) -> bool, first: usize) -> Option<usize> {
    if all.get(first).is_some_and(&is) {
        return Some(first);
    }
    all.iter().position(is)
}

enum Value<'a> {
    Missing,
    Number(f64),
    Bool(bool),
    Text(&'a str),
}

/// An entry of `Struct.fields`: key = 1, value = 2. The last one of each counts.
fn pair(mut entry: &[u8]) -> Option<(&str, Value<'_>)> {
    let (mut name, mut value) = ("", Value::Missing);
    while !entry.is_empty() {
        match field(&mut entry)? {
            (1, Field::Bytes(text)) => name = std::str::from_utf8(text).ok()?,
            (2, Field::Bytes(data)) => value = one(data)?,
            _ => return None,
        }
    }
    Some((name, value))
}

/// A `Value`: null = 1, number = 2, string = 3, bool = 4; objects and lists are odd.
fn one(mut data: &[u8]) -> Option<Value<'_>> {
    let mut value = Value::Missing;
    while !data.is_empty() {
        value = match field(&mut data)? {
            (1, Field::Varint(_)) => Value::Missing,
            (2, Field::Fixed64(bits)) => Value::Number(f64::from_bits(bits)),
            (3, Field::Bytes(text)) => Value::Text(std::str::from_utf8(text).ok()?),
            (4, Field::Varint(n)) => Value::Bool(n != 0),
            _ => return None,
        };
    }
    Some(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::mutations;

    fn names(all: &[&str]) -> Vec<Text> {
        let free = |&name: &&str| Text {
            name: name.into(),
            known: HashSet::new(),
            needed: false,
        };
        all.iter().map(free).collect()
    }

    fn numbers(all: &[&str]) -> Vec<Number> {
        let free = |&name: &&str| Number {
            name: name.into(),
            least: f64::NEG_INFINITY,
            most: f64::INFINITY,
            needed: false,
        };
        all.iter().map(free).collect()
    }

    /// {"a": 1.5, "s": "x"}
    const ROW: &[u8] =
        b"\x0a\x0e\x0a\x01a\x12\x09\x11\0\0\0\0\0\0\xf8\x3f\x0a\x08\x0a\x01s\x12\x03\x1a\x01x";

    #[test]
    fn reads_numbers_and_strings_and_what_is_missing() {
        let row = read(ROW, &numbers(&["b", "a"]), &names(&["s", "t"])).unwrap();
        assert!(row.numbers[0].is_nan());
        assert!((row.numbers[1] - 1.5).abs() < f64::EPSILON);
        assert_eq!(row.strings, ["x", ""]);
    }

    #[test]
    fn odd_rows_are_left_alone() {
        assert!(read(ROW, &numbers(&["a"]), &[]).is_none(), "unknown name");
        assert!(
            read(ROW, &numbers(&["a", "s"]), &[]).is_none(),
            "a string for a number"
        );
        assert!(
            read(ROW, &[], &names(&["a", "s"])).is_none(),
            "a number for a string"
        );
        for cut in 1..ROW.len() {
            let _ = read(&ROW[..cut], &numbers(&["a"]), &names(&["s"])); // must not panic
        }
        assert!(read(&ROW[..5], &numbers(&["a"]), &names(&["s"])).is_none());
    }

    #[test]
    fn values_out_of_range_and_missing_ones_are_odd() {
        let mut only = numbers(&["a"]);
        let strings = names(&["s"]);
        only[0].most = 1.5;
        assert!(read(ROW, &only, &strings).is_some());
        only[0].most = 1.4;
        assert!(read(ROW, &only, &strings).is_none());
        only[0].most = 2.0;
        assert!(read(b"", &only, &strings).is_some());
        only[0].needed = true;
        assert!(read(b"", &only, &strings).is_none());
    }

    #[test]
    fn no_bytes_make_it_panic() {
        for data in mutations(ROW) {
            let _ = read(&data, &numbers(&["a"]), &names(&["s"]));
        }
    }
}
