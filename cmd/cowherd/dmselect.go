package main

import (
	"cmp"
	"regexp"
	"strconv"
	"strings"

	"cowherd/api"
)

// A dmSelection tells whether a device is wanted; all are those that it may have relations to.
type dmSelection func(d *api.DMDevice, all []api.DMDevice) bool

// selectionParser reads a selection, as dmsetup's --select has it:
//
//	any   = every { ( "||" | "#" ) every }
//	every = one { ( "&&" | "," ) one }
//	one   = "!" one | "(" any ")" | FIELD OPERATOR VALUE
//
// An operator is one of = != =~ !~ and, for numbers, > >= < <=. A value is a word, or in quotes; a pattern may stand in
// brackets of any kind as well.
type selectionParser struct{ rest string }

// parseSelection reads a selection; an empty one wants everything.
func parseSelection(text string) (dmSelection, error) {
	if text == "" {
		return func(*api.DMDevice, []api.DMDevice) bool { return true }, nil
	}
	p := selectionParser{text}
	s, err := p.any()
	if err == nil && p.skip() != "" {
		err = p.error()
	}
	return s, err
}

func (p *selectionParser) error() error {
	return usagef("--select: %q is not understood: FIELD OPERATOR VALUE is wanted, joined by && or ||", p.rest)
}

// skip passes over space, and returns what is left.
func (p *selectionParser) skip() string {
	p.rest = strings.TrimLeft(p.rest, " \t")
	return p.rest
}

// take passes over one of words, and tells which; "" if none stands there.
func (p *selectionParser) take(words ...string) string {
	p.skip()
	for _, w := range words {
		if rest, ok := strings.CutPrefix(p.rest, w); ok {
			p.rest = rest
			return w
		}
	}
	return ""
}

func (p *selectionParser) any() (dmSelection, error) {
	s, err := p.every()
	for err == nil && p.take("||", "#") != "" {
		left := s
		var right dmSelection
		right, err = p.every()
		s = func(d *api.DMDevice, all []api.DMDevice) bool { return left(d, all) || right(d, all) }
	}
	return s, err
}

func (p *selectionParser) every() (dmSelection, error) {
	s, err := p.one()
	for err == nil && p.take("&&", ",") != "" {
		left := s
		var right dmSelection
		right, err = p.one()
		s = func(d *api.DMDevice, all []api.DMDevice) bool { return left(d, all) && right(d, all) }
	}
	return s, err
}

func (p *selectionParser) one() (dmSelection, error) {
	switch p.take("!", "(") {
	case "!":
		s, err := p.one()
		return func(d *api.DMDevice, all []api.DMDevice) bool { return !s(d, all) }, err
	case "(":
		s, err := p.any()
		if err == nil && p.take(")") == "" {
			err = p.error()
		}
		return s, err
	}
	end := strings.IndexFunc(p.rest, func(c rune) bool { return c != '_' && (c < 'a' || c > 'z') })
	if end < 1 {
		return nil, p.error()
	}
	column, err := findColumn(p.rest[:end])
	if err != nil {
		return nil, err
	}
	p.rest = p.rest[end:]
	operator := p.take("=~", "!~", "!=", ">=", "<=", "=", ">", "<")
	if operator == "" {
		return nil, p.error()
	}
	value, err := p.value(strings.HasSuffix(operator, "~"))
	if err != nil {
		return nil, err
	}
	return column.compare(operator, value)
}

// value reads a value.
func (p *selectionParser) value(pattern bool) (string, error) {
	const opening, closing = `"'([{`, `"')]}`
	kinds := 2
	if pattern {
		kinds = len(opening)
	}
	if p.skip() == "" {
		return "", p.error()
	}
	if kind := strings.IndexByte(opening[:kinds], p.rest[0]); kind >= 0 {
		value, rest, ok := strings.Cut(p.rest[1:], closing[kind:kind+1])
		if !ok {
			return "", p.error()
		}
		p.rest = rest
		return value, nil
	}
	end := strings.IndexAny(p.rest, " \t&|,#)")
	if end < 0 {
		end = len(p.rest)
	}
	value := p.rest[:end]
	p.rest = p.rest[end:]
	return value, nil
}

// compare wants devices whose value stands in a relation to another.
func (c *dmColumn) compare(operator, value string) (dmSelection, error) {
	negative := operator[0] == '!'
	if strings.HasSuffix(operator, "~") {
		pattern, err := regexp.Compile(value)
		if err != nil {
			return nil, usagef("--select: %w", err)
		}
		return func(d *api.DMDevice, all []api.DMDevice) bool {
			return pattern.MatchString(c.value(d, all)) != negative
		}, nil
	}
	if !c.right {
		if operator != "=" && operator != "!=" {
			return nil, usagef("--select: %s is for numbers, and %s is none", operator, c.id)
		}
		return func(d *api.DMDevice, all []api.DMDevice) bool { return (c.value(d, all) == value) != negative }, nil
	}
	wanted, err := strconv.ParseUint(value, 10, 64)
	if err != nil {
		return nil, usagef("--select: %s is a number, and %q is none", c.id, value)
	}
	return func(d *api.DMDevice, all []api.DMDevice) bool {
		n, _ := strconv.ParseUint(c.value(d, all), 10, 64) // it is a number
		switch order := cmp.Compare(n, wanted); operator {
		case ">":
			return order > 0
		case ">=":
			return order >= 0
		case "<":
			return order < 0
		case "<=":
			return order <= 0
		default:
			return (order == 0) != negative
		}
	}, nil
}
