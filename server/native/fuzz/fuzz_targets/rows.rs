//! Rows that are written right are read back; any other bytes give a row within its bounds, or none.
#![no_main]

use arbitrary::Arbitrary;
use forebay_native::rows::{Number, Text, read};
use libfuzzer_sys::fuzz_target;

const NUMBERS: [&str; 3] = ["a", "number", "\u{e9}"];
const STRINGS: [&str; 2] = ["s", "text"];

#[derive(Arbitrary, Debug)]
enum Input {
    Bytes(Vec<u8>),
    Row { values: [f64; 3], texts: [String; 2], spoil: Option<(u16, u8)> },
}

fn field(out: &mut Vec<u8>, number: u8, data: &[u8]) {
    out.push(number << 3 | 2);
    let mut n = data.len();
    while n > 127 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
    out.extend_from_slice(data);
}

fn entry(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    let mut pair = Vec::new();
    field(&mut pair, 1, name.as_bytes());
    field(&mut pair, 2, value);
    field(out, 1, &pair);
}

fuzz_target!(|input: Input| {
    let numbers: Vec<Number> = NUMBERS
        .iter()
        .map(|&name| Number { name: name.into(), least: -1e300, most: 1e300, needed: name == "a" })
        .collect();
    let strings: Vec<Text> = STRINGS
        .iter()
        .map(|&name| Text { name: name.into(), known: [].into(), needed: name == "s" })
        .collect();
    let (data, written) = match input {
        Input::Bytes(data) => (data, None),
        Input::Row { values, texts, spoil } => {
            let mut data = Vec::new();
            for (name, value) in NUMBERS.iter().zip(values) {
                let mut one = vec![0x11];
                one.extend(value.to_le_bytes());
                entry(&mut data, name, &one);
            }
            for (name, text) in STRINGS.iter().zip(&texts) {
                let mut one = Vec::new();
                field(&mut one, 3, text.as_bytes());
                entry(&mut data, name, &one);
            }
            let whole = spoil.is_none();
            if let Some((at, byte)) = spoil {
                let at = usize::from(at) % data.len();
                data[at] = byte;
            }
            (data, whole.then_some((values, texts)))
        }
    };
    let row = read(&data, &numbers, &strings);
    if let Some(row) = &row {
        assert_eq!((row.numbers.len(), row.strings.len()), (3, 2));
        assert!(!row.numbers[0].is_nan(), "a needed value is missing");
        assert!(!row.strings[0].is_empty(), "a needed text is missing");
        for n in &row.numbers {
            assert!(n.is_nan() || (-1e300..=1e300).contains(n));
        }
    }
    let Some((values, texts)) = written else { return };
    let good = !values[0].is_nan()
        && !texts[0].is_empty()
        && values.iter().all(|v| v.is_nan() || (-1e300..=1e300).contains(v));
    assert_eq!(row.is_some(), good);
    if let Some(row) = row {
        for (got, want) in row.numbers.iter().zip(values) {
            assert!(got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan()));
        }
        assert_eq!(row.strings, [texts[0].as_str(), texts[1].as_str()]);
    }
});
