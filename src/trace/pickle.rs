//! Python's pickles, protocols 2 to 5, read as plain data: lists, dictionaries, texts and numbers. Nothing is called or
//! imported; objects of classes, and whatever else there is, are [`Value::Other`].
//!
//! Values lie side by side and name each other by number, so neither reading nor dropping a pickle recurses, however
//! deep it is nested, and what a pickle mentions twice is kept once.

use std::collections::HashMap;

/// The number of a value.
#[derive(Clone, Copy, Debug)]
pub(super) struct Id(u32);

/// What a pickle says of one object.
#[derive(Debug)]
pub(super) enum Value<'a> {
    /// A whole number from 0 on.
    Number(u64),
    Text(&'a [u8]),
    /// A list or a tuple.
    List(Vec<Id>),
    /// Keys and values, in the order in which they were set.
    Dict(Vec<(Id, Id)>),
    Other,
}

/// All of them are one.
const OTHER: Id = Id(0);

/// A pickle that was read.
#[derive(Debug)]
pub(super) struct Pickle<'a> {
    values: Vec<Value<'a>>,
    root: Id,
}

const CUT_SHORT: &str = "an intact pickle; this one is cut short";
const UNKNOWN: &str = "an intact pickle; this one has an instruction that protocols 2 to 5 do not write";
const NO_OPERAND: &str = "an intact pickle; this one uses a value that is not there";
const WRONG_KIND: &str = "an intact pickle; this one fills a value that is no container";
const TOO_MANY: &str = "an intact pickle; this one has more than 2^32 values";

impl<'a> Pickle<'a> {
    /// Reads a pickle; an error says what was expected.
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self, &'static str> {
        let mut machine = Machine {
            rest: bytes,
            values: vec![Value::Other],
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
        };
        while !machine.step()? {}
        let root = machine.pop()?;
        Ok(Self { values: machine.values, root })
    }

    pub(super) fn root(&self) -> &Value<'a> {
        self.at(self.root)
    }

    fn at(&self, id: Id) -> &Value<'a> {
        &self.values[id.0 as usize]
    }

    /// What a dictionary has under a name.
    pub(super) fn field(&self, of: &Value<'a>, name: &str) -> Option<&Value<'a>> {
        let Value::Dict(pairs) = of else { return None };
        let is_named = |key: Id| matches!(self.at(key), Value::Text(text) if *text == name.as_bytes());
        // What was set last counts.
        pairs.iter().rev().find(|pair| is_named(pair.0)).map(|pair| self.at(pair.1))
    }

    /// What is in a list.
    pub(super) fn items(&self, of: &Value<'a>) -> Option<impl ExactSizeIterator<Item = &Value<'a>>> {
        let Value::List(ids) = of else { return None };
        Some(ids.iter().map(|&id| self.at(id)))
    }
}

/// The machine that a pickle is a program for.
struct Machine<'a> {
    rest: &'a [u8],
    values: Vec<Value<'a>>,
    stack: Vec<Id>,
    /// How high the stack was at each mark.
    marks: Vec<usize>,
    memo: HashMap<usize, Id>,
}

type Step<T> = Result<T, &'static str>;

impl<'a> Machine<'a> {
    /// Does one instruction; true at the last.
    fn step(&mut self) -> Step<bool> {
        let instruction = self.take(1)?[0];
        match instruction {
            b'.' => return Ok(true),
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_to_mark()?),
            b'2' => self.stack.push(self.top()?),
            // The protocol, and how long the frame is that begins.
            0x80 => drop(self.take(1)?),
            0x95 => drop(self.take(8)?),

            b'K' => self.number(1)?,
            b'M' => self.number(2)?,
            b'J' => self.number_or_less(4)?,
            0x8A => {
                let bytes = self.length(1)?;
                self.number_or_less(bytes)?;
            }
            0x8B => {
                let bytes = self.length(4)?;
                self.number_or_less(bytes)?;
            }
            0x8C | b'U' => self.text(1)?,
            b'X' | b'T' => self.text(4)?,
            0x8D => self.text(8)?,

            b']' | b')' => self.push(Value::List(Vec::new()))?,
            b'}' => self.push(Value::Dict(Vec::new()))?,
            0x85..=0x87 => {
                let items = self.pop_many(usize::from(instruction - 0x84))?;
                self.push(Value::List(items))?;
            }
            b't' | b'l' => {
                let items = self.pop_to_mark()?;
                self.push(Value::List(items))?;
            }
            b'd' => {
                let items = self.pop_to_mark()?;
                self.push(Value::Dict(Vec::new()))?;
                self.set(&items)?;
            }
            b'a' => {
                let item = self.pop()?;
                self.append(&[item])?;
            }
            b'e' => {
                let items = self.pop_to_mark()?;
                self.append(&items)?;
            }
            b's' => {
                let items = self.pop_many(2)?;
                self.set(&items)?;
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.set(&items)?;
            }

            b'q' | b'r' | 0x94 => {
                let key = match instruction {
                    b'q' => self.length(1)?,
                    b'r' => self.length(4)?,
                    _ => self.memo.len(),
                };
                self.memo.insert(key, self.top()?);
            }
            b'h' | b'j' => {
                let key = self.length(if instruction == b'h' { 1 } else { 4 })?;
                self.stack.push(*self.memo.get(&key).ok_or(NO_OPERAND)?);
            }

            // What is nothing here: none, true, false, a buffer beside the pickle, a set, a number with a point, ...
            b'N' | 0x88 | 0x89 | 0x97 | 0x8F => self.stack.push(OTHER),
            b'G' => self.other_of(8)?,
            // ... bytes, ...
            b'C' | b'B' | 0x8E | 0x96 => {
                let bytes = self.length(match instruction {
                    b'C' => 1,
                    b'B' => 4,
                    _ => 8,
                })?;
                self.other_of(bytes)?;
            }
            // ... classes by number or by name, what is made of such, with its state, and sets.
            0x82 => self.other_of(1)?,
            0x83 => self.other_of(2)?,
            0x84 => self.other_of(4)?,
            b'c' => {
                self.skip_line()?;
                self.skip_line()?;
                self.stack.push(OTHER);
            }
            b'i' => {
                self.skip_line()?;
                self.skip_line()?;
                self.pop_to_mark()?;
                self.stack.push(OTHER);
            }
            b'Q' | 0x98 => self.other_from(1)?,
            0x93 | b'R' | 0x81 | b'b' => self.other_from(2)?,
            0x92 => self.other_from(3)?,
            0x91 | b'o' => {
                self.pop_to_mark()?;
                self.stack.push(OTHER);
            }
            0x90 => drop(self.pop_to_mark()?),
            // Also what older protocols write: values as lines of text.
            _ => return Err(UNKNOWN),
        }
        Ok(false)
    }

    fn take(&mut self, bytes: usize) -> Step<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(bytes).ok_or(CUT_SHORT)?;
        self.rest = rest;
        Ok(taken)
    }

    fn skip_line(&mut self) -> Step<()> {
        let end = self.rest.iter().position(|&byte| byte == b'\n').ok_or(CUT_SHORT)?;
        self.take(end + 1).map(drop)
    }

    /// A length or a key, in so many bytes; what no address reaches, no file has.
    fn length(&mut self, bytes: usize) -> Step<usize> {
        let mut whole = [0; 8];
        whole[..bytes].copy_from_slice(self.take(bytes)?);
        usize::try_from(u64::from_le_bytes(whole)).map_err(|_| CUT_SHORT)
    }

    fn push(&mut self, value: Value<'a>) -> Step<()> {
        let id = u32::try_from(self.values.len()).map_err(|_| TOO_MANY)?;
        self.values.push(value);
        self.stack.push(Id(id));
        Ok(())
    }

    fn number(&mut self, bytes: usize) -> Step<()> {
        let number = self.length(bytes)? as u64;
        self.push(Value::Number(number))
    }

    /// A number with a sign, in so many bytes. What is less than 0 or beyond 64 bits is nothing to us.
    fn number_or_less(&mut self, bytes: usize) -> Step<()> {
        let digits = self.take(bytes)?;
        let (low, high) = digits.split_at(digits.len().min(8));
        let negative = digits.last().is_some_and(|&byte| byte >= 0x80);
        if negative || high.iter().any(|&byte| byte != 0) {
            self.stack.push(OTHER);
            return Ok(());
        }
        let mut whole = [0; 8];
        whole[..low.len()].copy_from_slice(low);
        self.push(Value::Number(u64::from_le_bytes(whole)))
    }

    /// A text, behind its length in so many bytes.
    fn text(&mut self, bytes: usize) -> Step<()> {
        let bytes = self.length(bytes)?;
        let text = self.take(bytes)?;
        self.push(Value::Text(text))
    }

    fn other_of(&mut self, bytes: usize) -> Step<()> {
        self.take(bytes)?;
        self.stack.push(OTHER);
        Ok(())
    }

    fn other_from(&mut self, operands: usize) -> Step<()> {
        self.pop_many(operands)?;
        self.stack.push(OTHER);
        Ok(())
    }

    /// How high the last mark is, below which nothing is taken.
    fn above_mark(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn top(&self) -> Step<Id> {
        self.stack[self.above_mark()..].last().copied().ok_or(NO_OPERAND)
    }

    fn pop(&mut self) -> Step<Id> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    fn pop_many(&mut self, count: usize) -> Step<Vec<Id>> {
        let at = self.stack.len().checked_sub(count).filter(|&at| at >= self.above_mark());
        Ok(self.stack.split_off(at.ok_or(NO_OPERAND)?))
    }

    fn pop_to_mark(&mut self) -> Step<Vec<Id>> {
        let mark = self.marks.pop().ok_or(NO_OPERAND)?;
        Ok(self.stack.split_off(mark))
    }

    /// Adds to the list on top.
    fn append(&mut self, items: &[Id]) -> Step<()> {
        let top = self.top()?;
        match &mut self.values[top.0 as usize] {
            Value::List(list) => list.extend(items),
            // An object of a class, which takes them its own way.
            Value::Other => {}
            _ => return Err(WRONG_KIND),
        }
        Ok(())
    }

    /// Sets keys of the dictionary on top.
    fn set(&mut self, items: &[Id]) -> Step<()> {
        let (pairs, odd) = items.as_chunks::<2>();
        if !odd.is_empty() {
            return Err(NO_OPERAND);
        }
        let top = self.top()?;
        match &mut self.values[top.0 as usize] {
            Value::Dict(dict) => dict.extend(pairs.iter().map(|&[key, value]| (key, value))),
            Value::Other => {}
            _ => return Err(WRONG_KIND),
        }
        Ok(())
    }
}
