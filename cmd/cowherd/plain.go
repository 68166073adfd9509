package main

import (
	"encoding"
	"iter"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
)

// To parse a command line, kong builds a model of the grammar. For one command that takes half a millisecond, as long as
// a clone of an image does. But nearly all command lines are plain: names of commands, arguments, and flags that are
// true, or have a text or a number. They are read here, by the same grammar. What is wrong is not plain either, so that
// kong says what is.

// runner is a command that has been parsed.
type runner interface{ Run(s *session) error }

// plainField is a flag or an argument.
type plainField struct {
	value     reflect.Value
	name      string
	short     string // "": it has no short name
	enum      string // what it may be, with commas between; "": anything
	negatable bool   // --no-NAME makes it false
	optional  bool   // of an argument: it may be missing
	kongs     bool   // a line that has it is not plain
	given     bool
}

// plainLine is what may be on a line.
type plainLine struct{ flags, arguments []plainField }

// parsePlain reads a line into c. Where it is not plain, what c holds then means nothing.
func (c *cli) parsePlain(words []string) (command runner, plain bool) {
	if len(words) == 0 || words[0] == "completion" { // which asks for kong's model
		return nil, false
	}
	var l plainLine
	part := reflect.ValueOf(c).Elem()
	for {
		var word string
		if len(words) > 0 {
			word = words[0]
		}
		below, plain := l.add(part, word)
		if !plain {
			return nil, false
		}
		if !below.IsValid() {
			break
		}
		part, words = below, words[1:]
	}
	command, plain = part.Addr().Interface().(runner)
	return command, plain && l.read(words)
}

// add adds the flags and arguments of a part of the grammar, and gives them their defaults. below is the command of that
// name in it, if it has one.
func (l *plainLine) add(part reflect.Value, name string) (below reflect.Value, plain bool) {
	for i := range part.NumField() {
		field := part.Type().Field(i)
		if field.Anonymous {
			if _, plain := l.add(part.Field(i), ""); !plain {
				return below, false
			}
			continue
		}
		f := plainField{value: part.Field(i), name: commandName(field.Name)}
		kind, plain := f.describe(field.Tag)
		switch {
		case kind == "cmd":
			if f.name == name {
				below = f.value
			}
		case !plain:
			return below, false
		case kind == "arg":
			l.arguments = append(l.arguments, f)
		default:
			l.flags = append(l.flags, f)
		}
	}
	return below, true
}

// describe takes over what the tag says, and sets the default. kind is "cmd", "arg", or "" for a flag. It is not plain
// where something would have to be done with it although it is not given.
func (f *plainField) describe(tag reflect.StructTag) (kind string, plain bool) {
	plain = true
	for key, value := range tagsOf(tag) {
		switch key {
		case "cmd", "arg":
			kind = key
		case "name":
			f.name = value
		case "short":
			f.short = value
		case "enum":
			f.enum = value
		case "negatable":
			f.negatable = true
		case "optional":
			f.optional = true
		case "default":
			plain = plain && f.set(value)
		case "env":
			if value, ok := os.LookupEnv(value); ok {
				plain = plain && f.set(value)
			}
		case "required":
			plain = false
		case "help", "placeholder", "complete", "hidden":
		default: // something that only kong knows
			f.kongs = true
		}
	}
	return kind, plain
}

// tagsOf are the keys and values of a tag. An escape in a value stays.
func tagsOf(tag reflect.StructTag) iter.Seq2[string, string] {
	return func(yield func(key, value string) bool) {
		for rest := string(tag); rest != ""; rest = strings.TrimLeft(rest, " ") {
			key, quoted, ok := strings.Cut(rest, `:"`)
			end := 0
			for end < len(quoted) && quoted[end] != '"' {
				if quoted[end] == '\\' {
					end++
				}
				end++
			}
			if !ok || end >= len(quoted) || !yield(key, quoted[:end]) {
				return
			}
			rest = quoted[end+1:]
		}
	}
}

// set gives f a value. It is false where kong has to.
func (f *plainField) set(text string) bool {
	if f.enum != "" && !slices.Contains(strings.Split(f.enum, ","), text) {
		return false
	}
	switch to := f.value.Addr().Interface().(type) {
	case *string:
		*to = text
	case *bool:
		*to = text == "true"
		return *to || text == "false"
	case *int:
		n, err := strconv.Atoi(text)
		*to = n
		return err == nil && strconv.Itoa(n) == text // not 010, or 1_000
	case encoding.TextUnmarshaler:
		return to.UnmarshalText([]byte(text)) == nil
	default:
		return false
	}
	return true
}

// read reads what is behind the names of commands.
func (l *plainLine) read(words []string) bool {
	arguments := l.arguments
	for len(words) > 0 {
		word := words[0]
		words = words[1:]
		if word == "" {
			return false
		}
		if word[0] != '-' {
			if len(arguments) == 0 || arguments[0].kongs || !arguments[0].set(word) {
				return false
			}
			arguments = arguments[1:]
			continue
		}
		name, value, valued := strings.Cut(word, "=")
		f, is := l.flag(name)
		short := !strings.HasPrefix(name, "--")
		if f == nil || f.given || f.kongs || short && valued {
			return false
		}
		f.given = true
		if to, ok := f.value.Addr().Interface().(*bool); ok {
			if *to = is; valued {
				return false
			}
			continue
		}
		if !valued && len(words) > 0 {
			value, words = words[0], words[1:]
		}
		if value == "" || value[0] == '-' || !f.set(value) {
			return false
		}
	}
	return len(arguments) == 0 || arguments[0].optional
}

// flag is the flag that a word names; is tells what that means where it is true or false.
func (l *plainLine) flag(word string) (f *plainField, is bool) {
	for i := range l.flags {
		f := &l.flags[i]
		switch name, long := strings.CutPrefix(word, "--"); {
		case long && name == f.name, !long && f.short != "" && word[1:] == f.short:
			return f, true
		case long && f.negatable && name == "no-"+f.name:
			return f, false
		}
	}
	return nil, false
}
