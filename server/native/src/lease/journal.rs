//! The file that counters of answered calls are appended to before the answers leave.

use std::fs::File;
use std::io::Write;

use parking_lot::Mutex;

#[derive(Default)]
struct State {
    file: Option<File>,
    /// Something was written since somebody asked.
    dirty: bool,
    /// The last line may have no end.
    torn: bool,
}

/// See the module. Python opens the file, and writes to it too: each line by one write, at the end.
#[derive(Default)]
pub struct Journal(Mutex<State>);

impl Journal {
    /// Writes go to this file from now on, and none to the one before.
    pub fn set(&self, file: Option<File>) {
        *self.0.lock() = State {
            file,
            ..State::default()
        };
    }

    /// Whether there is a file.
    pub fn is_set(&self) -> bool {
        self.0.lock().file.is_some()
    }

    /// Appends whole lines. False when that failed; then a part of them may be there, without an end.
    pub fn append(&self, lines: &[u8]) -> bool {
        let mut state = self.0.lock();
        let Some(mut file) = state.file.as_ref() else {
            return false;
        };
        let written = file.write(lines).unwrap_or(0);
        state.dirty |= written > 0;
        let whole = written == lines.len();
        state.torn |= written > 0 && !whole;
        whole
    }

    /// Whether something was written since the last time.
    pub fn take_dirty(&self) -> bool {
        std::mem::take(&mut self.0.lock().dirty)
    }

    /// Whether a line without an end was left since the last time.
    pub fn take_torn(&self) -> bool {
        std::mem::take(&mut self.0.lock().torn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_go_to_the_file_of_the_moment() {
        let folder = std::env::temp_dir().join(format!("forebay-journal-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let (first, second) = (folder.join("1"), folder.join("2"));
        let journal = Journal::default();
        assert!(!journal.append(b"x\n") && !journal.is_set());
        journal.set(Some(File::create(&first).unwrap()));
        assert!(journal.append(b"a\n") && journal.is_set());
        assert!(journal.take_dirty() && !journal.take_dirty());
        journal.set(Some(File::create(&second).unwrap()));
        assert!(journal.append(b"b\n") && !journal.take_torn());
        let read = |path| std::fs::read_to_string(path).unwrap();
        assert_eq!((read(&first), read(&second)), ("a\n".into(), "b\n".into()));
        journal.set(Some(File::open(&first).unwrap())); // not to be written
        assert!(!journal.append(b"c\n") && !journal.take_torn());
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
